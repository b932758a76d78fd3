"""What the page's tests share: how one asks, what the page says while it answers, and how steps are run and told."""

import argparse

from chromium import Chromium, Failure

LAST = "[...document.querySelectorAll('.turn.assistant')].pop()"
IDLE = "document.querySelector('#send').getAttribute('aria-label') === 'Send'"


def expect(condition, what):
    if not condition:
        raise Failure(what)


def ask(tab, text):
    tab.js("document.querySelector('#prompt').focus()")
    tab.type(text)
    tab.enter()


def run(steps, about):
    """Runs the steps one after the other in one tab; the first is given the address and opens the page. The exit code."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="where the server listens")
    url = parser.parse_args().url.rstrip("/") + "/"
    passed = failed = 0
    with Chromium() as tab:
        for step in steps:
            name = step.__name__.replace("_", " ")
            try:
                step(tab, url) if step is steps[0] else step(tab)
                if tab.console:
                    raise Failure("console: " + " | ".join(tab.console))
                passed += 1
                print(f"ok    {name}", flush=True)
            except Failure as failure:
                failed += 1
                print(f"FAIL  {name}: {failure}", flush=True)
                tab.console.clear()
                if step is steps[0]:
                    # Without a page the other steps have nothing to say.
                    break
    print(f"{passed} passed, {failed} failed, {len(steps) - passed - failed} not reached")
    return 1 if failed else 0
