// Makes the "Send" buttons of the API page work: sends the request and shows the answer as it came.
"use strict";

function request(form) {
  const method = form.dataset.method;
  let path = form.dataset.path;
  const query = new URLSearchParams();
  const headers = {};
  for (const input of form.querySelectorAll("input[data-in]")) {
    const value = input.value.trim();
    if (input.dataset.in === "path") path = path.replace(`{${input.name}}`, encodeURIComponent(value));
    else if (value !== "" && input.dataset.in === "query") query.set(input.name, value);
    else if (value !== "") headers[input.name] = value;
  }
  const key = document.getElementById("key")?.value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  const body = form.elements.body?.value;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const search = query.toString();
  return [search ? `${path}?${search}` : path, { method, headers, body }];
}

function readable(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

async function send(form) {
  const output = form.parentElement.querySelector(".answer");
  const lines = document.createElement("pre");
  try {
    const [address, options] = request(form);
    const answer = await fetch(address, options);
    const headers = ["location", "link", "retry-after", "idempotency-replayed"]
      .filter((name) => answer.headers.has(name))
      .map((name) => `${name}: ${answer.headers.get(name)}`);
    lines.textContent = [`${answer.status} ${answer.statusText}`, ...headers, "", readable(await answer.text())].join("\n");
  } catch (error) {
    lines.textContent = `No answer: ${error.message}`;
  }
  output.replaceChildren(lines);
}

for (const form of document.querySelectorAll("form.try")) {
  form.querySelector("button").disabled = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form);
  });
}
