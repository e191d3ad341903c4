// Shows every time on the page in the reader's own time zone, and says which; without this script they stay in UTC.
"use strict";

const timeFormat = new Intl.DateTimeFormat(document.documentElement.dataset.locale, {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", timeZoneName: "short",
});

function showLocalTimes(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(element.dateTime);
    if (Number.isNaN(moment.getTime())) continue;
    element.title = element.dateTime;
    element.textContent = timeFormat.format(moment);
  }
}

showLocalTimes(document);
