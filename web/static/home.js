// Adds to the form what HTML alone cannot do: plus and minus buttons, the running total, warnings about stock, another
// part of the catalogue without a new page, fresh recent orders.
"use strict";

const form = document.getElementById("order-form");
const catalogue = document.getElementById("catalogue");
const place = document.getElementById("place");
const search = document.getElementById("search");
const locale = document.documentElement.dataset.locale;
// Milliseconds: when typing counts as over, and how long an answer may take.
const TYPING = 250;
const ANSWERED = 10_000;

function money(minor, currency) {
  const format = new Intl.NumberFormat(locale, { style: "currency", currency });
  return format.format(minor / 10 ** format.resolvedOptions().maximumFractionDigits);
}

function number(value) {
  return new Intl.NumberFormat(locale).format(value);
}

function quantities() {
  return [...catalogue.querySelectorAll("input[data-price]")];
}

function quantityOf(input) {
  const quantity = Number(input.value);
  return Number.isInteger(quantity) && quantity > 0 ? quantity : 0;
}

function lineOf(text, amount) {
  const line = document.createElement("p");
  for (const part of [text, amount]) {
    const span = document.createElement("span");
    span.textContent = part;
    line.append(span);
  }
  return line;
}

function warn(input, quantity) {
  const stock = Number(input.dataset.stock);
  const warning = input.closest(".product")?.querySelector(".warning");
  if (!warning) return;
  const short = quantity > stock;
  const described = new Set((input.getAttribute("aria-describedby") ?? "").split(" ").filter(Boolean));
  if (short) described.add(warning.id);
  else described.delete(warning.id);
  input.setAttribute("aria-describedby", [...described].join(" "));
  warning.hidden = !short;
  warning.textContent = short ? `${number(quantity)} chosen, ${stock ? number(stock) : "none"} left` : "";
}

function showTotal() {
  const lines = document.getElementById("lines");
  const shown = [];
  let total = 0;
  let currency = quantities()[0]?.dataset.currency;
  for (const input of quantities()) {
    const quantity = quantityOf(input);
    input.closest(".product")?.classList.toggle("chosen", quantity > 0);
    warn(input, quantity);
    if (quantity === 0) continue;
    const sum = quantity * Number(input.dataset.price);
    total += sum;
    currency = input.dataset.currency;
    shown.push(lineOf(`${number(quantity)} × ${input.dataset.name}`, money(sum, currency)));
  }
  if (shown.length === 0) {
    const nothing = document.createElement("p");
    nothing.className = "nothing";
    nothing.textContent = "Nothing chosen yet.";
    shown.push(nothing);
  }
  lines.replaceChildren(...shown);
  lines.hidden = false;
  if (currency) document.getElementById("total-amount").value = money(total, currency);
}

function step(input, difference) {
  const wanted = quantityOf(input) + difference;
  input.value = Math.min(Number(input.max), Math.max(0, wanted));
  showTotal();
}

function stepButton(input, difference, sign, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = sign;
  button.disabled = input.disabled;
  // The number field itself steps with the arrow keys, so the buttons need no stop of the Tab key.
  button.tabIndex = -1;
  button.setAttribute("aria-label", `${text} ${input.dataset.name}`);
  button.addEventListener("click", () => step(input, difference));
  return button;
}

function addButtons() {
  for (const input of catalogue.querySelectorAll(".stepper input")) {
    input.before(stepButton(input, -1, "−", "One less of"));
    input.after(stepButton(input, +1, "+", "One more of"));
    input.addEventListener("focus", () => input.select());
  }
  showTotal();
}

let asked = 0;
let typing = null;
let turning = Promise.resolve();

// Shows another part of the catalogue; `button` is what was pressed for it, if anything was. One part after the other,
// so that a press means what is chosen already; a search that a newer one follows is left out.
function turn(button) {
  clearTimeout(typing);
  const mine = ++asked;
  turning = turning.then(() => (button || mine === asked ? show(button) : undefined));
}

async function show(button) {
  const data = new FormData(form);
  if (button) data.set(button.name, button.value);
  let html;
  try {
    const body = new URLSearchParams(data);
    const answer = await fetch("/catalogue", { method: "POST", body, signal: AbortSignal.timeout(ANSWERED) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    html = await answer.text();
  } catch {
    // A page of its own says what is wrong.
    if (button?.isConnected) {
      button.dataset.plain = "yes";
      form.requestSubmit(button);
    }
    return;
  }
  await released(catalogue);
  // What was chosen since then would be lost.
  for (const [name, value] of new FormData(form)) {
    if (name.startsWith("quantity-") && data.get(name) !== value) return show(button);
  }
  catalogue.innerHTML = html;
  addButtons();
  document.getElementById("found").textContent = document.getElementById("shelf").dataset.found;
  if (!button) return;
  const again = [...catalogue.querySelectorAll("button[name]")].find((one) => one.name === button.name && one.value === button.value);
  if (button.name === "show" && again) {
    again.focus();
  } else {
    document.getElementById("products").focus({ preventScroll: true });
    document.getElementById("products").scrollIntoView();
  }
}

catalogue.addEventListener("input", showTotal);
addButtons();
document.getElementById("errors")?.focus();

search?.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => turn(null), TYPING);
});

form.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !event.target.matches("input")) return;
  // Enter presses the first button of a form; here it does what the field is for.
  event.preventDefault();
  if (event.target === search) turn(null);
  else form.requestSubmit(place);
});

form.addEventListener("submit", (event) => {
  const button = event.submitter;
  if (button?.hasAttribute("formaction")) {
    if (button.dataset.plain) return;
    event.preventDefault();
    turn(button);
    return;
  }
  if (form.dataset.sent) {
    event.preventDefault();
    return;
  }
  form.dataset.sent = "yes";
  place.setAttribute("aria-busy", "true");
  place.textContent = "Placing the order …";
});

// Back from the order's page: the browser shows this page as it was left, and the next order is another one.
window.addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  delete form.dataset.sent;
  place.removeAttribute("aria-busy");
  place.textContent = "Place order";
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  form.elements.submission.value = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
});

async function refreshRecent() {
  const recent = document.getElementById("recent");
  // Not under the hands of someone who is using it.
  if (document.hidden || recent.contains(document.activeElement)) return;
  try {
    const answer = await fetch("/recent-orders");
    if (!answer.ok) return;
    const html = await answer.text();
    await released(recent);
    if (recent.contains(document.activeElement)) return;
    recent.innerHTML = html;
    showLocalTimes(recent);
  } catch {
    // The service does not answer; the list stays as it is, and the next time may go well.
  }
}

setInterval(refreshRecent, 4000);
