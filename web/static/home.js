// Adds to the form what HTML alone cannot do: plus and minus buttons, the running total, fresh recent orders.
"use strict";

const form = document.getElementById("order-form");
const quantities = [...form.querySelectorAll(".stepper input")];
const place = document.getElementById("place");

function money(minor, currency) {
  const format = new Intl.NumberFormat("en", { style: "currency", currency });
  return format.format(minor / 10 ** format.resolvedOptions().maximumFractionDigits);
}

function quantityOf(input) {
  const quantity = Number(input.value);
  return Number.isInteger(quantity) && quantity > 0 ? quantity : 0;
}

function showTotal() {
  const lines = document.getElementById("lines");
  lines.replaceChildren();
  let total = 0;
  let currency = "EUR";
  for (const input of quantities) {
    const quantity = quantityOf(input);
    input.closest(".product").classList.toggle("chosen", quantity > 0);
    if (quantity === 0) continue;
    const sum = quantity * Number(input.dataset.price);
    total += sum;
    currency = input.dataset.currency;
    const line = document.createElement("p");
    const name = document.createElement("span");
    name.textContent = `${quantity} × ${input.dataset.name}`;
    const amount = document.createElement("span");
    amount.textContent = money(sum, currency);
    line.append(name, amount);
    lines.append(line);
  }
  if (total === 0) {
    const nothing = document.createElement("p");
    nothing.className = "nothing";
    nothing.textContent = "Nothing chosen yet.";
    lines.append(nothing);
  }
  lines.hidden = false;
  document.getElementById("total").hidden = false;
  document.getElementById("total-amount").value = money(total, currency);
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

for (const input of quantities) {
  input.before(stepButton(input, -1, "−", "One less of"));
  input.after(stepButton(input, +1, "+", "One more of"));
  input.addEventListener("input", showTotal);
  input.addEventListener("focus", () => input.select());
}
showTotal();
document.getElementById("errors")?.focus();

form.addEventListener("submit", (event) => {
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
    const answer = await fetch("/orders/recent");
    if (!answer.ok) return;
    recent.innerHTML = await answer.text();
    showLocalTimes(recent);
  } catch {
    // The service does not answer; the list stays as it is, and the next time may go well.
  }
}

setInterval(refreshRecent, 4000);
