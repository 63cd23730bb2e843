"""A package with an async function."""

import asyncio

from . import inner


async def execute():
    await asyncio.sleep(0.01)
    return inner.VALUE
