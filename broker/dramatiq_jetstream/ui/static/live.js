// Keeps the page up to date, and shows times in the reader's zone. Without it a page shows what was there when it was
// loaded, and everything works.
"use strict";

const timeFormat = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

function showLocalTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(element.dateTime);
    if (Number.isNaN(moment.getTime())) continue;
    element.title = element.dateTime;
    element.textContent = timeFormat.format(moment);
  }
}

// What tells a control from others across two versions of the page.
function nameOf(element) {
  return element.id || element.getAttribute("aria-label") || element.getAttribute("href") || "";
}

function replace(part, html) {
  const fresh = new DOMParser().parseFromString(html, "text/html").body;
  showLocalTimes(fresh);
  const focused = part.contains(document.activeElement) ? nameOf(document.activeElement) : "";
  for (const open of part.querySelectorAll("details[open][id]")) {
    fresh.querySelector(`#${CSS.escape(open.id)}`)?.setAttribute("open", "");
  }
  part.replaceChildren(...fresh.childNodes);
  if (focused) {
    [...part.querySelectorAll("a, button, input")].find((control) => nameOf(control) === focused)?.focus({ preventScroll: true });
  }
}

function follow(part, state) {
  const said = state.querySelector("[role=status]");
  const hold = state.querySelector("button");
  let source = null;
  let waiting = null;

  const say = (text, kind) => {
    if (said.textContent !== text) said.textContent = text;
    state.className = `live-state ${kind}`;
  };
  // Rows must not move away from under a hand that chooses some of them.
  const isChoosing = () => part.querySelector("input[type=checkbox]:checked") !== null;
  const isHeld = () => hold.getAttribute("aria-pressed") === "true";
  // A click is lost when what is under it is replaced between its press and its release.
  let isPressed = false;
  const show = () => {
    if (waiting === null || isHeld() || isPressed) return;
    if (isChoosing()) {
      say("Waits for your choice", "held");
      return;
    }
    replace(part, waiting);
    waiting = null;
    say("Live", "on");
  };

  const open = () => {
    source = new EventSource(location.href);
    source.addEventListener("open", () => { if (!isHeld()) say("Live", "on"); });
    source.addEventListener("part", (event) => { waiting = event.data; show(); });
    source.addEventListener("error", () => {
      if (source.readyState === EventSource.CLOSED) say("Not live", "off");
    });
  };

  hold.addEventListener("click", () => {
    const held = !isHeld();
    hold.setAttribute("aria-pressed", String(held));
    say(held ? "Held" : "Live", held ? "held" : "on");
    show();
  });
  part.addEventListener("change", show);
  part.addEventListener("pointerdown", () => { isPressed = true; });
  for (const end of ["pointerup", "pointercancel"]) {
    // The click comes after the release, in the same task or the next.
    window.addEventListener(end, () => setTimeout(() => { isPressed = false; show(); }));
  }
  // A page in the background asks for nothing, and a page that the Back button brings back is live again.
  document.addEventListener("visibilitychange", () => {
    source?.close();
    if (!document.hidden) open();
  });
  window.addEventListener("pagehide", () => source?.close());
  window.addEventListener("pageshow", (event) => { if (event.persisted) open(); });
  state.hidden = false;
  say("Live", "on");
  open();
}

showLocalTimes(document);
const part = document.getElementById("live");
if (part) follow(part, document.getElementById("live-state"));
