// One reminder that several people edit at once: whatever one saves, the others see as it is committed.
import { createClient } from "@supabase/supabase-js"

const SAVED_AFTER_MS = 150

const client = createClient("http://127.0.0.1:8432", "sb_publishable_for_this_machine")
const id = Number(new URLSearchParams(location.search).get("id") ?? 1)
const form = document.getElementById("reminder")
const state = document.getElementById("state")
const unsaved = new Map() // the name of a field, and the timer that saves it

// What the client sends with each join: `since`, of walstream, is behind which change to go on.
const asked = { event: "UPDATE", schema: "public", table: "reminders", filter: `id=eq.${id}`, since: null }

client
  .channel(`reminder:${id}`)
  .on("postgres_changes", asked, ({ new: row }) => {
    asked.since = row.$position
    show(row)
  })
  .on("system", {}, ({ message }) => message.startsWith("Changes may be missing") && load())
  .subscribe((status) => {
    const isLive = status === "SUBSCRIBED"
    state.textContent = isLive ? "live" : "connecting"
    state.className = isLive ? "live" : ""
    if (isLive && asked.since === null) load()
  })

async function load() {
  const answer = await fetch(`/reminders/${id}`)
  form.hidden = answer.status === 404
  if (answer.ok) show(await answer.json())
  else {
    state.textContent = answer.status === 404 ? `there is no reminder ${id}` : "the reminder could not be read"
    state.className = ""
  }
}

// Long values that an update did not touch are not sent: those stay as they are. So does what
// somebody is typing here; once it is saved it comes back.
function show(row) {
  for (const field of form.elements) {
    if (!(field.name in row) || unsaved.has(field.name)) continue
    if (field.type === "checkbox") field.checked = row[field.name]
    else if (field.value !== row[field.name]) field.value = row[field.name]
  }
}

form.addEventListener("input", ({ target: field }) => {
  clearTimeout(unsaved.get(field.name))
  unsaved.set(field.name, setTimeout(() => save(field), SAVED_AFTER_MS))
})

// Only the field that was changed: who edits another one at the same time loses nothing.
async function save(field) {
  unsaved.delete(field.name)
  const value = field.type === "checkbox" ? field.checked : field.value
  await fetch(`/reminders/${id}`, { method: "PATCH", body: JSON.stringify({ [field.name]: value }) })
}

form.addEventListener("submit", (event) => event.preventDefault())
