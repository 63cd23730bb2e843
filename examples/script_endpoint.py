"""An HTTP endpoint that runs the scripts of its users: POST /run {"code": "...", "arguments": {...}}.

Each script runs in a sandbox of its own, and sets `result`. What is wrong with a script is a 4xx with the explanation.

    pip install fastapi uvicorn
    uvicorn --app-dir examples script_endpoint:app
    curl --json '{"code": "result = sum(numbers)", "arguments": {"numbers": [1, 2, 3]}}' localhost:8000/run
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from sandbox import (
    PluginExecutionError,
    PluginLimitsV2,
    ResourceLimitExceededError,
    SandboxException,
    SandboxExecutor,
    SecurityViolationError,
)

WORKERS, MOST = 4, 16  # scripts at once; with those that wait
LIMITS = PluginLimitsV2(max_memory_mb=64, max_execution_time_seconds=1, max_output_mb=1)


class Script(BaseModel):
    code: str = Field(max_length=100_000)
    arguments: dict[str, Any] = {}


def run_script(code: str, arguments: dict[str, Any]) -> str:
    """Inside the sandbox: the script's `result` as JSON, so that one which is not JSON is the script's mistake."""
    import json

    names = dict(arguments)
    exec(compile(code, "script", "exec"), names)
    return json.dumps(names.get("result"), allow_nan=False)


@asynccontextmanager
async def life(app: FastAPI) -> AsyncIterator[None]:
    with SandboxExecutor(WORKERS, level="strict", limits=LIMITS) as executor:
        app.state.executor, app.state.running = executor, 0
        yield


app = FastAPI(title="User scripts", lifespan=life)


@app.post("/run")
async def run(script: Script) -> Response:
    if app.state.running >= MOST:
        return JSONResponse({"error": "busy", "detail": f"{MOST} scripts run or wait already: try again"}, 429)
    app.state.running += 1
    try:
        # A client that goes away cancels this, which kills the script.
        result = await asyncio.wrap_future(app.state.executor.submit(run_script, script.code, script.arguments))
    except SandboxException as error:
        status, kind = judged(error)
        return JSONResponse({"error": kind, "detail": str(error)}, status)
    finally:
        app.state.running -= 1
    return Response(f'{{"result": {result}}}', media_type="application/json")


def judged(error: SandboxException) -> tuple[int, str]:
    """The status for what came of a script."""
    if isinstance(error, ResourceLimitExceededError):
        return (408, "timeout") if error.limit == "time" else (413, f"limit of {error.limit}")
    if isinstance(error, SecurityViolationError):
        return 403, "not permitted"
    if isinstance(error, PluginExecutionError):
        return 422, "the script failed"
    return 503, "no sandbox can be had"
