"""What the requests of visitors may cost the demo's server: sizes, unread answers, and no download."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

from ..utils.extras import require_extra


with require_extra("demo"):
    import gradio as gr
    from gradio.queueing import Event, EventMessage, ProcessCompletedMessage, Queue
    from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
    from starlette.responses import PlainTextResponse


MAX_FILE_SIZE = 20 * 2**20  # bytes of an upload
# Bytes of any other request: parsed JSON takes up to a hundred times the memory of its text, and 32 requests wait. The
# longest texts take 48 kilobytes.
MAX_BODY_SIZE = 2**17
# Number of answers that no visitor has fetched yet, up to 8 megabytes each. Gradio would keep all of them. As many may
# be on their way to visitors who read slowly.
MAX_UNREAD = 16


def limit_unread(queue: Queue) -> None:
    """Replaces all answers but the last `MAX_UNREAD` by an error if they are not fetched yet."""
    send, answers = queue.send_message, deque()

    def send_message(event: Event, message: EventMessage) -> None:
        if isinstance(message, ProcessCompletedMessage):
            answers.append(weakref.ref(message))  # a fetched answer is gone
            while len(answers) > MAX_UNREAD:
                if oldest := answers.popleft()():
                    oldest.success, oldest.output = False, {"error": "The answer was not fetched in time: ask again."}
        send(event, message)

    queue.send_message = send_message


class OfflineBlocks(gr.Blocks):
    """Blocks that download no file. Gradio would fetch any URL in place of an upload, whole into the memory."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        def check(file: dict) -> None:
            if is_http_url_like(file["path"]):
                raise gr.Error("The demo opens no URL: upload the image.", print_exception=False)

        traverse(inputs, check, is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


class LimitedRequests:
    """
    Middleware that cuts off the body of an upload at `MAX_FILE_SIZE`, and that of any other request at
    `MAX_BODY_SIZE`. Gradio limits only files. A screen recording, which the page does not make, is cut off at once,
    because Gradio would give it to ffmpeg, whose memory has no limit. A path with a URL is not found, because Gradio
    would fetch the URL. A large answer is sent in parts, and is cut off if `MAX_UNREAD` later ones are on their way:
    the server would keep the rest of each answer as long as the visitor does not read it.
    """

    # Bytes, by the end of a path. An upload has headers beside its file.
    _LIMITS = {"/gradio_api/upload": MAX_FILE_SIZE + 2**16, "/gradio_api/process_recording": 0}
    _LARGE, _PART = 2**20, 2**16  # bytes: the system itself keeps about a megabyte of each response

    def __init__(self, app):
        self.app, self._sent = app, deque()  # tasks that send large answers

    async def __call__(self, scope, receive, send):
        received, path = 0, scope.get("path", "")
        if "://" in path:
            return await PlainTextResponse("Not Found", 404)(scope, receive, send)
        limit = next((size for end, size in self._LIMITS.items() if path.endswith(end)), MAX_BODY_SIZE)

        async def limited():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= limit else {"type": "http.disconnect"}

        is_cut_off = False

        async def send_in_parts(message):
            nonlocal is_cut_off
            if is_cut_off:
                return
            if len(message.get("body", b"")) <= self._LARGE:
                await send(message)
            else:
                is_cut_off = not await self._send_large(message, send)

        await self.app(scope, *((limited, send_in_parts) if scope["type"] == "http" else (receive, send)))

    async def _send_large(self, message, send) -> bool:
        """Sends the body of a message in parts. Returns whether it was sent to the end."""

        async def send_parts():
            body = message["body"]
            for start in range(0, len(body), self._PART):
                more = message.get("more_body", False) or start + self._PART < len(body)
                await send({**message, "body": body[start : start + self._PART], "more_body": more})

        sending = asyncio.ensure_future(send_parts())
        self._sent.append(sending)
        if len(self._sent) > MAX_UNREAD:
            self._sent.popleft().cancel()
        try:
            await asyncio.wait([sending])
        finally:
            sending.cancel()
            if sending in self._sent:
                self._sent.remove(sending)
        return not sending.cancelled() and sending.result() is None  # raises what `send` raised
