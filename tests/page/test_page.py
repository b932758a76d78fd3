#!/usr/bin/env python3
"""Drives the chat page of a running server as a person would, in headless Chromium.

    python tests/page/test_page.py --url http://127.0.0.1:8080

Needs Python 3.9 and Chromium, nothing else. Exits 0 when every step passed.
"""

import sys

from runner import IDLE, LAST, ask, expect, run


def loads(tab, url):
    """The page loads under its policy, says which model answers and puts the cursor where one types."""
    tab.open(url)
    name = tab.until("document.querySelector('#model').textContent.trim()", "the model's name")
    expect("reach" not in name and "key" not in name, f"the page shows {name!r} for the model")
    expect(tab.js("document.activeElement.id") == "prompt", "the message field has no focus")
    expect(tab.js("document.querySelector('#send').disabled"), "an empty message could be sent")
    inline = tab.js("(() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
                    "document.head.append(s); s.remove(); return window.hacked || 0; })()")
    expect(inline == 0, "the content policy lets a foreign script run")
    # The policy reports the refused script; that is its success, not an error of the page.
    tab.console.clear()


def streams(tab):
    """A message typed and sent with Enter comes back in pieces, then with its figures."""
    tab.js("""(() => { window.lengths = new Set(); new MutationObserver(() => {
        const a = %s; if (a) window.lengths.add(a.querySelector('.answer').textContent.length); })
        .observe(document.querySelector('#log'), { childList: true, subtree: true, characterData: true }); })()""" % LAST)
    ask(tab, "Write three sentences about the sea.")
    expect(tab.js("document.querySelector('.turn.user').textContent") == "Write three sentences about the sea.",
           "the message isn't shown")
    tab.until(f"{LAST}.querySelector('.answer').textContent.trim().length > 0", "the first text")
    tab.until(IDLE, "the end of the answer", deadline=120)
    expect(not tab.js(f"!!{LAST}.querySelector('.trouble')"), tab.js(f"({LAST}.querySelector('.trouble')||{{}}).textContent"))
    expect(tab.js("window.lengths.size") >= 3, "the answer came in one piece")
    for part, wanted in ((".rate", "tok/s"), (".ttft", "first token"), (".count", "token")):
        text = tab.js(f"({LAST}.querySelector('.facts {part}') || {{}}).textContent") or ""
        expect(wanted in text and any(c in "123456789" for c in text), f"{part} shows {text!r}")
    expect(len(tab.js(f"({LAST}.querySelector('.facts .print') || {{}}).textContent") or "") >= 8, "no fingerprint")
    expect(tab.js("document.querySelector('#status').textContent") == "Answer finished", "the end isn't announced")
    expect(tab.js("document.querySelector('#log').getAttribute('aria-busy')") == "false", "the log still says busy")


def breaks_lines(tab):
    """Shift and Enter make a new line and send nothing."""
    tab.js("document.querySelector('#prompt').focus()")
    tab.type("one")
    tab.enter(modifiers=8)
    tab.type("two")
    expect(tab.js("document.querySelector('#prompt').value") == "one\ntwo", "Shift and Enter made no new line")
    expect(tab.js("document.querySelectorAll('.turn.user').length") == 1, "Shift and Enter sent the message")
    tab.js("document.querySelector('#prompt').value = ''")


def stops(tab):
    """Esc stops a long answer; what was there stays, and the next message works."""
    # Past its natural end, so that how long a small model talks doesn't decide this step.
    tab.js("settings.max_tokens = 1500; window.realFetch = window.fetch; window.fetch = (url, options) =>"
           "realFetch(url, { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ignore_eos: true }) })")
    ask(tab, "Count from one to five hundred in words, one number a line.")
    tab.until(f"{LAST}.querySelector('.answer').textContent.trim().length > 20", "some text to stop")
    expect(not tab.js(IDLE), "the answer ended before it could be stopped")
    tab.escape()
    tab.js("window.fetch = realFetch")
    tab.until(IDLE, "the answer to stop", deadline=5)
    text = tab.js(f"{LAST}.querySelector('.answer').textContent")
    expect(len(text) > 20, "the text was thrown away")
    expect("stopped" in tab.js(f"{LAST}.querySelector('.facts').textContent"), "the page doesn't say it was stopped")
    expect(not tab.js(f"!!{LAST}.querySelector('.trouble')"), "stopping is shown as an error")
    tab.js(f"window.stopped = {LAST}; settings.max_tokens = 8")
    ask(tab, "Say yes.")
    tab.until(IDLE + f" && {LAST}.querySelector('.answer').textContent.trim().length > 0", "an answer after a stop")
    # Whatever had still been on its way would have come before another whole answer.
    expect(tab.js("stopped.querySelector('.answer').textContent") == text, "text still arrived after the stop")
    tab.js("settings.max_tokens = DEFAULTS.max_tokens")


def stays_text(tab):
    """Markup in a message or an answer is text, and Markdown becomes elements."""
    tab.js("""(() => { const into = document.createElement('div'); into.id = 'drawn'; document.body.append(into);
        draw('# Title\\n\\nA **bold** `<b>` <img src=x onerror=alert(1)>\\n\\n- one\\n- two\\n  - deep\\n\\n```js\\nlet x = "</code><script>";\\n```\\n'
           + '[no](javascript:alert(1)) [yes](https://example.org/a)', into); })()""")
    found = tab.js("""(() => { const d = document.querySelector('#drawn'); const n = (s) => d.querySelectorAll(s).length;
        return [n('img,script,b'), n('strong'), n('ul > li > ul > li'), n('pre code'), n('h3'), n('a'), d.querySelector('a').href]; })()""")
    expect(found == [0, 1, 1, 1, 1, 1, "https://example.org/a"], f"Markdown came out as {found}")
    tab.js("document.querySelector('#drawn').remove()")
    tab.js("settings.max_tokens = 4")
    ask(tab, "<img src=x onerror='window.hacked=1'> & <b>bold</b>")
    tab.until(IDLE, "the answer")
    expect(tab.js("[...document.querySelectorAll('.turn.user')].pop().children[0].children.length") == 0, "a message became markup")
    tab.js("settings.max_tokens = DEFAULTS.max_tokens")


def settings(tab):
    """The panel opens from the keyboard, holds the focus order, closes with Esc and is obeyed."""
    tab.js("document.querySelector('#gear').focus()")
    tab.enter()
    tab.until("document.querySelector('#panel').open", "the settings to open", deadline=5)
    expect(tab.js("document.activeElement.id") == "s-system", "the first setting has no focus")
    tab.type("Answer in one word.")
    tab.tabulator()
    expect(tab.js("document.activeElement.id") == "s-temperature", "Tab doesn't go to the next setting")
    tab.escape()
    tab.until("!document.querySelector('#panel').open", "the settings to close", deadline=5)
    expect(tab.js("document.activeElement.id") == "gear", "the focus was lost")
    expect(tab.js("JSON.parse(localStorage.getItem('consort.settings')).system") == "Answer in one word.", "a setting was not kept")
    tab.js("document.querySelector('#defaults').click()")


def starts_over(tab):
    """New chat clears the conversation."""
    tab.click("#fresh")
    tab.until("document.querySelector('.welcome') && !document.querySelector('.turn')", "an empty conversation", deadline=5)
    expect(tab.js("document.activeElement.id") == "prompt", "the message field has no focus")


def suits_the_eye(tab):
    """Dark and light differ, text is readable in both, and nothing sticks out on a phone."""
    contrast = """(() => { const lum = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => { x /= 255; return x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; });
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
        const back = lum(getComputedStyle(document.body).backgroundColor);
        const ratio = (s) => { const f = lum(getComputedStyle(document.querySelector(s)).color); return (Math.max(f, back) + .05) / (Math.min(f, back) + .05); };
        return [back, ratio('body'), ratio('#model'), ratio('.hint')]; })()"""
    seen = {}
    for scheme in ("light", "dark"):
        tab.scheme(scheme)
        seen[scheme] = tab.js(contrast)
        expect(min(seen[scheme][1:]) >= 4.5, f"contrast in {scheme} is {seen[scheme][1:]}")
    expect(seen["light"][0] > 0.8 and seen["dark"][0] < 0.05, f"backgrounds are {seen}")
    tab.size(360, 640, mobile=True)
    expect(tab.js("document.documentElement.scrollWidth <= 360"), "the page is wider than a phone")
    button = tab.js("(() => { const r = document.querySelector('#send').getBoundingClientRect(); return [r.bottom, r.width]; })()")
    expect(button[0] <= 640 and button[1] >= 32, f"the send button is at {button} on a phone")
    tab.scheme("light")
    tab.size(1100, 800)


def says_what_is_wrong(tab):
    """A server that can't be reached is told kindly, and the message can be sent again."""
    tab.js("window.realFetch = window.fetch; window.fetch = () => Promise.reject(new TypeError('failed'))")
    ask(tab, "hello")
    tab.until("document.querySelector('.trouble')", "the error to show", deadline=5)
    expect("be reached" in tab.js("document.querySelector('.trouble').textContent"), "the error isn't understandable")
    tab.js("settings.max_tokens = 4; window.fetch = window.realFetch; document.querySelector('.trouble button').click()")
    tab.until(IDLE + f" && {LAST}.querySelector('.answer').textContent.trim()", "the answer of the second try")
    expect(not tab.js("!!document.querySelector('.trouble')"), "the error stays after the second try")
    tab.js("settings.max_tokens = DEFAULTS.max_tokens")


STEPS = (loads, streams, breaks_lines, stops, stays_text, settings, starts_over, suits_the_eye, says_what_is_wrong)


if __name__ == "__main__":
    sys.exit(run(STEPS, __doc__))
