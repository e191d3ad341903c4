// Keeps the list of orders up to date: asks for the page again every few seconds, and says how many orders are new.
"use strict";

const list = document.getElementById("list");
const announce = document.getElementById("announce");
const EVERY = 5000;
// What is said aloud more often than this is noise.
const SAID_EVERY = 30000;
let said = -SAID_EVERY;
let unsaid = 0;

function orders(root) {
  return [...root.querySelectorAll("[data-order]")].map((row) => row.dataset.order);
}

async function refresh() {
  // Not under the hands of someone who is using it.
  if (document.hidden || list.contains(document.activeElement)) return;
  let fresh;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok || answer.redirected) return;
    fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("list");
  } catch {
    return; // The service does not answer; the list stays as it is, and the next time may go well.
  }
  await released(list);
  if (!fresh || list.contains(document.activeElement)) return;
  const known = new Set(orders(list));
  const added = orders(fresh).filter((order) => !known.has(order)).length;
  list.replaceChildren(...fresh.childNodes);
  showLocalTimes(list);
  unsaid += added;
  if (unsaid === 0 || performance.now() - said < SAID_EVERY) return;
  announce.textContent = unsaid === 1 ? "A new order." : `${unsaid} new orders.`;
  said = performance.now();
  unsaid = 0;
}

if (list?.hasAttribute("data-refresh")) setInterval(refresh, EVERY);
