#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`transformers serve`, except that what the processor refuses (a broken image, a wrong prompt) and requests that lack
something are answered with status 400 and the reason, not 500. Values of a wrong type get 500, as they do there.

Takes the arguments of `transformers serve` (`pip install transformers[serving]`). For example:

    python scripts/serve.py dpvr-7b --trust-remote-code --port 8000
"""

import sys

from PIL import UnidentifiedImageError
from transformers.cli import transformers as command_line
from transformers.cli.serving import server


def build_server(*args, **kwargs):
    """The application of `transformers serve`. What the processor says of broken images and wrong prompts is for the
    client to know."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    app = build_plain_server(*args, **kwargs)

    async def bad_request(_: Request, error: Exception) -> JSONResponse:
        message = f"the request lacks {error}" if isinstance(error, KeyError) else str(error)
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

    for error in (ValueError, UnidentifiedImageError, KeyError):
        app.add_exception_handler(error, bad_request)
    return app


build_plain_server = server.build_server

if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    server.build_server = build_server
    sys.argv.insert(1, "serve")
    command_line.main()
