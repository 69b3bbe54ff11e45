"""Downloads with a limit of time and size."""

import time
import urllib.parse
import urllib.request
from http.client import HTTPException


MAX_DOWNLOAD = 64 * 2**20  # largest size of a file, in bytes


def is_url(name: object) -> bool:
    """Returns whether `name` is a URL of http or https, from which an image is downloaded."""
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https. The base class also follows redirects to ftp."""

    def redirect_request(self, request, file, code, message, headers, url):
        if not is_url(url):
            raise ValueError("it is redirected to another protocol than http and https")
        file.close()  # the base class would read its content to the end, whatever its size
        return super().redirect_request(request, file, code, message, headers, url)


def download(url: str, timeout: float) -> bytes:
    """
    Downloads a file of at most [`MAX_DOWNLOAD`] bytes. Raises `OSError` if the file is larger, the download takes
    longer than `timeout` seconds, or the URL is not valid.
    """
    content = bytearray()
    deadline = time.monotonic() + timeout
    address = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")  # quotes spaces and non-ASCII letters
    try:
        # Some sites refuse the user agent of urllib.
        request = urllib.request.Request(address, headers={"User-Agent": "iclip-hf"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=timeout) as opened:
            while part := opened.read1(2**16):
                content += part
                if len(content) > MAX_DOWNLOAD:
                    raise OSError(f"it has more than {MAX_DOWNLOAD // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it did not end within {timeout:g} seconds")
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{url[:100]!r}: the image cannot be downloaded: {error}") from error
    return bytes(content)
