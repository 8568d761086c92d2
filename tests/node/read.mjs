// Reads a stream by the package eventsource, and prints each event as a line of JSON.
import { EventSource } from "eventsource"

const [url, token] = process.argv.slice(2)
const source = new EventSource(url, {
  fetch: (input, init) =>
    fetch(input, { ...init, headers: { ...init.headers, ...(token && { Authorization: `Bearer ${token}` }) } }),
})
const print = (event) =>
  console.log(JSON.stringify({ name: event.type, id: event.lastEventId, data: event.data }))
const names = ["insert", "update", "delete", "truncate", "streaming", "position", "reset", "end"]
for (const name of [...names, "message"]) source.addEventListener(name, print)
source.onerror = (event) => {
  if (source.readyState === EventSource.CLOSED) {
    console.log(JSON.stringify({ name: "failed", id: "", data: String(event.code ?? "") }))
  }
}
