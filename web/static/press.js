// A click is lost when what is under it is replaced between its press and its release. Scripts that replace a part of the
// page wait for `released`.
"use strict";

let pressedOn = null;
let waiting = [];

function letGo() {
  pressedOn = null;
  for (const goOn of waiting.splice(0)) goOn();
}

// Keeps a promise when no pointer is pressed on a part of the page: at once when none is.
function released(part) {
  if (pressedOn === null || !part.contains(pressedOn)) return Promise.resolve();
  return new Promise((goOn) => { waiting.push(goOn); });
}

window.addEventListener("pointerdown", (event) => { if (event.button === 0) pressedOn = event.target; }, true);
// The click comes after the release, in the same task.
for (const end of ["pointerup", "pointercancel"]) window.addEventListener(end, () => setTimeout(letGo), true);
// A release outside of the window is not told.
window.addEventListener("pointermove", (event) => { if (pressedOn && event.buttons === 0) letGo(); }, true);
