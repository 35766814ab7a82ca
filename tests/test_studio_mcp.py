"""The studio's endpoints as tools of the Model Context Protocol (needs `pip install "gradio[mcp]"`)."""

import asyncio

import pytest

pytest.importorskip("mcp")

from tiny_reference import PROMPTS

from textcond.apps.engine import Engine
from textcond.apps.studio import Studio, build


@pytest.fixture(scope="module")
def address(demo, tmp_path_factory):
    page = build(Studio(Engine(demo.pipeline, demo.index), tmp_path_factory.mktemp("studio")))
    _, url, _ = page.queue(default_concurrency_limit=4).launch(
        prevent_thread_lock=True, quiet=True, mcp_server=True, footer_links=[], run_history=False
    )
    yield f"{url}gradio_api/mcp/"
    page.close(verbose=False)


def _asked(address, work):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def run():
        async with streamablehttp_client(address) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return await work(session)

    return asyncio.run(run())


def test_the_tools_are_the_typed_endpoints_and_described(address):
    tools = {tool.name: tool for tool in _asked(address, lambda session: session.list_tools()).tools}
    assert {name.split("_")[-1] for name in tools} == {"generate", "search", "embed"}
    generate = next(tool for name, tool in tools.items() if name.endswith("generate"))
    assert "Draw a picture of a prompt" in generate.description
    assert generate.inputSchema["properties"]["steps"]["type"] == "integer"


def test_a_tool_draws_and_a_tool_finds(address):
    async def work(session):
        names = {tool.name.split("_")[-1]: tool.name for tool in (await session.list_tools()).tools}
        drawn = await session.call_tool(names["generate"], {"prompt": "red fox", "seed": 1, "steps": 2})
        found = await session.call_tool(names["search"], {"query": PROMPTS[0], "k": 1, "mode": "dense"})
        return drawn, found

    drawn, found = _asked(address, work)
    assert not drawn.isError
    assert "image" in {content.type for content in drawn.content}
    assert PROMPTS[0] in found.content[0].text
