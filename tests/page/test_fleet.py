#!/usr/bin/env python3
"""Drives the page of a running `consort up` with two replicas, in headless Chromium: an answer survives the death of the
replica that gives it, killed with the page's own button.

    python tests/page/test_fleet.py --url http://127.0.0.1:8080

Needs Python 3.9 and Chromium, nothing else. Exits 0 when every step passed.
"""

import sys

from chromium import Failure
from runner import IDLE, LAST, ask, expect, run

READY = "document.querySelectorAll('.replica.ready').length"
TOKENS = 700


def shows_the_fleet(tab, url):
    """Two replicas are there with their figures, beside a chat that has the focus."""
    tab.size(1360, 860)
    tab.open(url)
    tab.until(READY + " === 2", "two replicas")
    expect(tab.js("document.activeElement.id") == "prompt", "the message field has no focus")
    expect("2 of 2 ready" in tab.js("document.querySelector('#fleet-sum').textContent"), "the sum is wrong")
    expect(tab.js("document.querySelectorAll('.tile svg path').length") == 8, "the plots are missing")
    details = tab.js("[...document.querySelectorAll('.replica .detail')].map((d) => d.textContent).join()")
    expect("pid" in details and "thread" in details, f"the details are {details!r}")
    expect(tab.js("[...document.querySelectorAll('.kill')].every((b) => !b.disabled)"), "a button is off")


def survives(tab):
    """The serving replica is killed in mid-answer; the answer goes on and ends as it would have."""
    tab.js("settings.temperature = 0; settings.max_tokens = %d; window.realFetch = window.fetch; window.fetch = (url, options) =>"
           "String(url).includes('completions') ? realFetch(url, { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ignore_eos: true }) })"
           " : realFetch(url, options)" % TOKENS)
    question = "Tell me a long story about a lighthouse keeper who collects storms."
    ask(tab, question)
    tab.until(f"{LAST} && {LAST}.querySelector('.answer').textContent.length > 20", "the first words")
    tab.until(IDLE, "the undisturbed answer", deadline=120)
    whole = tab.js(f"{LAST}.querySelector('.answer').textContent")
    expect(len(whole) > 400, f"the answer is only {whole!r}")

    tab.js("document.querySelector('#fresh').click()")
    ask(tab, question)
    tab.until(f"{LAST} && {LAST}.querySelector('.answer').textContent.length > 20 && document.querySelector('.replica.serving')",
              "the replica that serves it", deadline=30)
    victim = tab.js("document.querySelector('.replica.serving').dataset.id")
    tab.click(".replica.serving .kill")
    tab.until("document.querySelector('#status').textContent.startsWith('Killed') || %s" % IDLE, "the kill", deadline=10)
    expect(not tab.js(IDLE), "the answer was over before its replica was killed")
    tab.until(f"![...document.querySelectorAll('.replica')].some((r) => r.dataset.id === '{victim}')", "it to be gone", deadline=30)
    tab.until(IDLE, "the end of the answer", deadline=120)
    expect(not tab.js(f"!!{LAST}.querySelector('.trouble')"), tab.js(f"({LAST}.querySelector('.trouble')||{{}}).textContent"))
    got = tab.js(f"{LAST}.querySelector('.answer').textContent")
    expect(got == whole, f"the answer is not the same:\n{got!r}\n{whole!r}")
    tab.until(READY + " === 2", "two replicas again", deadline=60)
    expect(victim in tab.js("document.querySelector('#events').textContent"), "the page doesn't say what happened")
    expect("1 lost" in tab.js("document.querySelector('#counts').textContent"), "the loss isn't counted")
    tab.js("window.fetch = realFetch; document.querySelector('#fresh').click()")


def works_by_keyboard(tab):
    """The fleet opens and closes from the keyboard, and a button of it can be reached."""
    tab.js("document.querySelector('#fleet-button').focus()")
    tab.enter()
    tab.until("document.querySelector('#fleet').hidden", "the fleet to close", deadline=5)
    expect(tab.js("document.activeElement.id") == "fleet-button", "the focus was lost")
    tab.enter()
    tab.until("!document.querySelector('#fleet').hidden", "the fleet to open", deadline=5)
    for _ in range(12):
        tab.tabulator()
        if tab.js("document.activeElement.classList.contains('kill')"):
            label = tab.js("document.activeElement.getAttribute('aria-label')")
            expect(label.startswith("Kill ") and len(label) > 6, f"the button is called {label!r}")
            return
    raise Failure("Tab never reaches a button")


def suits_the_eye(tab):
    """Readable in both schemes; nothing sticks out on a phone, and the chat stays usable beside the fleet."""
    contrast = """(() => { const lum = (c) => { const p = document.createElement('canvas').getContext('2d'); p.fillStyle = c; p.fillRect(0, 0, 1, 1);
        const v = [...p.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => { x /= 255; return x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; });
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
        const ratio = (s, on) => { const f = lum(getComputedStyle(document.querySelector(s)).color), b = lum(getComputedStyle(document.querySelector(on)).backgroundColor);
            return (Math.max(f, b) + .05) / (Math.min(f, b) + .05); };
        return [ratio('.replica .detail', '.replica'), ratio('.kill', '.kill'), ratio('.tile .name', '.tile'), ratio('#fleet-sum', 'aside'), ratio('.events time, .events span', 'aside')]; })()"""
    for scheme in ("light", "dark"):
        tab.scheme(scheme)
        seen = tab.js(contrast)
        expect(min(seen) >= 4.5, f"contrast in {scheme} is {seen}")
    tab.scheme("light")
    tab.size(360, 640, mobile=True)
    expect(tab.js("document.documentElement.scrollWidth <= 360"), "the page is wider than a phone")
    place = tab.js("(() => { const r = document.querySelector('#send').getBoundingClientRect(), f = document.querySelector('#fleet').getBoundingClientRect(); return [r.bottom, f.height, f.width]; })()")
    expect(place[0] <= 640 and place[1] <= 360 and place[2] <= 360, f"send ends at {place[0]}, the fleet is {place[2]} by {place[1]}")
    tab.size(1360, 860)


STEPS = (shows_the_fleet, survives, works_by_keyboard, suits_the_eye)


if __name__ == "__main__":
    sys.exit(run(STEPS, __doc__))
