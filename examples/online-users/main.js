// Who has the page open, and what they do: presence, and the rows of a table as they are inserted.
import { createClient } from "@supabase/supabase-js"

const KEPT = 100

const client = createClient("http://127.0.0.1:8432", "sb_publishable_for_this_machine")
const users = document.getElementById("users")
const interactions = document.getElementById("interactions")
const state = document.getElementById("state")
const form = document.getElementById("me")

// Whoever has two tabs open is one user. Here the name in the address says who that is; in an
// application it is the one who has signed in.
const user = new URLSearchParams(location.search).get("user") ?? crypto.randomUUID()
form.elements.name.value = user

const asked = { event: "INSERT", schema: "public", table: "user_interactions", since: null }

const channel = client.channel("page:home", { config: { presence: { key: user } } })
channel
  .on("presence", { event: "sync" }, showUsers)
  .on("postgres_changes", asked, ({ new: row }) => {
    asked.since = row.$position
    interactions.prepend(item(`${row.user_id} ${row.action}`))
    while (interactions.children.length > KEPT) interactions.lastElementChild.remove()
  })
  .subscribe((status) => {
    const isLive = status === "SUBSCRIBED"
    state.textContent = isLive ? "live" : "connecting"
    state.className = isLive ? "live" : ""
    if (isLive) sayWhoIAm() // after each reconnect, too
  })

function sayWhoIAm() {
  return channel.track({ name: form.elements.name.value, at: new Date().toISOString() })
}

// The state has each user once, with what each of their tabs says.
function showUsers() {
  const present = Object.values(channel.presenceState())
  const shown = present.map((tabs) => item(tabs.length > 1 ? `${tabs[0].name} (${tabs.length} tabs)` : tabs[0].name))
  users.replaceChildren(...shown.sort((one, other) => one.textContent.localeCompare(other.textContent)))
}

function item(text) {
  const element = document.createElement("li")
  element.textContent = text
  return element
}

form.addEventListener("submit", (event) => {
  event.preventDefault()
  sayWhoIAm()
})
