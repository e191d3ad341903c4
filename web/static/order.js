// Keeps an order's page up to date: by a stream of events, and by asking again when there can be no stream.
"use strict";

const view = document.getElementById("order");
const connection = document.getElementById("connection");
const announce = document.getElementById("announce");
const address = view.dataset.address;
const POLL = 2000;
// An order that rests is asked for ever more seldom, up to this pause.
const POLL_AT_REST = 15000;
// After this many successful polls a stream is tried again.
const POLLS_BEFORE_STREAM = 5;

let revision = view.dataset.revision;
let rests = view.dataset.rests === "true";
let pause = POLL;
let newest = null;
let source = null;
let timer = null;

async function show(state) {
  trouble(false);
  rests = state.rests;
  newest = state;
  await released(view);
  if (newest !== state || state.revision === revision) return;
  pause = POLL;
  const changed = state.sentence !== view.dataset.sentence;
  revision = state.revision;
  view.dataset.sentence = state.sentence;
  const restore = typed();
  view.innerHTML = state.html;
  restore();
  showLocalTimes(view);
  if (changed) {
    announce.textContent = `${state.text}. ${state.sentence}`;
    document.title = `${state.text} · Order ${view.dataset.id}`;
  }
}

// Keeps what a visitor is typing while the page is drawn again; returns what puts it back.
function typed() {
  const opened = [...view.querySelectorAll("details[open]")].map(({ id }) => id);
  const values = [...view.querySelectorAll("input:not([type=hidden]), select")].map(({ id, value }) => [id, value]);
  const focused = view.contains(document.activeElement) ? document.activeElement.id : "";
  return () => {
    for (const id of opened) document.getElementById(id)?.setAttribute("open", "");
    for (const [id, value] of values) {
      const field = document.getElementById(id);
      if (field) field.value = value;
    }
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  };
}

function trouble(is) {
  const text = is ? "The service does not answer right now. Your order is safe; trying again …" : "";
  // Said once, not at every try.
  if (connection.textContent !== text) connection.textContent = text;
}

function follow() {
  stop();
  if (document.hidden) return;
  if (rests) {
    timer = setTimeout(() => poll(1), pause);
    pause = Math.min(2 * pause, POLL_AT_REST);
    return;
  }
  source = new EventSource(`${address}/stream`);
  source.addEventListener("order", (event) => {
    show(JSON.parse(event.data));
    if (rests) follow();
  });
  source.addEventListener("error", () => {
    // CONNECTING means that the stream ended in good order and the browser opens the next one by itself.
    if (source && source.readyState === EventSource.CLOSED) {
      stop();
      timer = setTimeout(() => poll(POLLS_BEFORE_STREAM), POLL);
    }
  });
}

async function poll(left) {
  try {
    const answer = await fetch(`${address}/state`);
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
    left -= 1;
  } catch {
    trouble(true);
  }
  if (rests || left <= 0) follow();
  else timer = setTimeout(() => poll(left), POLL);
}

function stop() {
  clearTimeout(timer);
  source?.close();
  source = null;
}

// A hidden page needs no stream; it catches up when it is shown again.
document.addEventListener("visibilitychange", () => {
  pause = POLL;
  if (document.hidden) stop();
  else follow();
});
window.addEventListener("pagehide", stop);
window.addEventListener("pageshow", (event) => event.persisted && follow());
follow();
