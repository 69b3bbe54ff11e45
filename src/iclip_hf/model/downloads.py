"""Downloads with a limit of time and size."""

import re
import threading
import time
import urllib.parse
import urllib.request
from concurrent import futures
from http.client import HTTPException


MAX_DOWNLOAD = 64 * 2**20  # largest size of a file, in bytes


def is_url(name: object) -> bool:
    """Returns whether an image is named by a URL that is downloaded."""
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


def without_password(name: str) -> str:
    """Returns a name for messages: a URL without its user name and password, and anything else unchanged."""
    return re.sub(r"(?<=://)[^/?#]*@", "", name) if is_url(name) else name


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https. The default also follows those to ftp."""

    def redirect_request(self, request, file, code, message, headers, url):
        if not is_url(url):
            raise ValueError("it is redirected to another protocol than http and https")
        return super().redirect_request(request, file, code, message, headers, url)


def download(url: str, timeout: float) -> bytes:
    """
    Downloads a file of at most [`MAX_DOWNLOAD`] bytes. Raises `OSError` if it is larger, does not come within
    `timeout` seconds, or the URL is not valid or holds a password.
    """
    answer, late = futures.Future(), TimeoutError(f"it did not end within {timeout:g} seconds")
    end = time.monotonic() + timeout

    def fetch() -> None:
        content = bytearray()
        try:
            if without_password(url) != url:  # urllib would ask for a host of this name, and name it in its error
                raise ValueError("a URL with a user name or a password is not supported; download it yourself")
            address = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")  # quotes spaces and non-ASCII letters
            # Some sites refuse Python's default.
            request = urllib.request.Request(address, headers={"User-Agent": "iclip-hf"})
            opener = urllib.request.build_opener(_Redirects)
            with opener.open(request, timeout=timeout + 1) as opened:  # the thread is left before that
                while part := opened.read1(2**16):
                    content += part
                    if len(content) > MAX_DOWNLOAD:
                        raise OSError(f"it has more than {MAX_DOWNLOAD // 2**20} MiB")
                    if time.monotonic() > end:
                        raise late
            answer.set_result(bytes(content))
        except Exception as error:
            answer.set_exception(error)

    # A thread, because the timeout of a socket restarts with every byte, also of the headers.
    threading.Thread(target=fetch, daemon=True).start()
    try:
        return answer.result(timeout)
    except futures.TimeoutError:
        problem = late
    except (OSError, HTTPException, ValueError) as error:
        problem = error
    raise OSError(f"{without_password(url)[:100]!r}: the image cannot be downloaded: {problem}") from problem
