"""The served studio as a browser uses it, without one."""

from __future__ import annotations

import json
import urllib.request

from textcond.apps.metadata import NATIVE

# What the components of the left side hold, in the order in which the server takes them.
SETTINGS = {
    "prompt": "fox",
    "negative": "",
    "seed": 5,
    "steps": 2,
    "guidance": 3.0,
    "encoder": NATIVE,
    "width": 0,
    "height": 0,
    "scheduler": "own",
    "neighbours": "off",
    "strength": 0.3,
}


class Page:
    """The served page as a browser uses it: events go in by name, the values of the outputs come back."""

    def __init__(self, url: str):
        self.url = url
        self.config = self._read("config")
        self.events = {event["api_name"]: event for event in self.config["dependencies"]}

    def props(self, name):
        """What the component with that elem_id is before anything happened."""
        return next(one["props"] for one in self.config["components"] if one["props"].get("elem_id") == name)

    def _read(self, path, data=None):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def messages(self, name, *inputs, session="one", event_data=None):
        """Fire an event and yield the messages of its run as they come, the last of them its end."""
        join = {"data": inputs, "fn_index": self.events[name]["id"], "session_hash": session, "event_data": event_data}
        self._read("gradio_api/queue/join", join)
        with urllib.request.urlopen(f"{self.url}gradio_api/queue/data?session_hash={session}", timeout=300) as stream:
            for line in stream:
                if line.startswith(b"data: "):
                    message = json.loads(line[6:])
                    yield message
                    if message["msg"] == "process_completed":
                        return
        raise AssertionError(f"{name} did not end")

    def fire(self, name, *inputs, session="one", event_data=None):
        """Fire an event and return the messages of its run."""
        return list(self.messages(name, *inputs, session=session, event_data=event_data))

    def call(self, name, *inputs, session="one"):
        """Fire an event that does not wait in the queue."""
        data = {"data": inputs, "fn_index": self.events[name]["id"], "session_hash": session}
        return self._read("gradio_api/run/predict", data)["data"]
