import { StrictMode, useState } from "react"
import { createRoot } from "react-dom/client"
import { createClient } from "@supabase/supabase-js"
import { MessageList } from "./MessageList.jsx"

const client = createClient("http://127.0.0.1:8432", "sb_publishable_for_this_machine")

async function loadMessages(conversation) {
  const answer = await fetch(`/messages?${new URLSearchParams({ conversation })}`)
  return answer.json()
}

async function say(conversation, form) {
  const body = JSON.stringify({ conversation, sender: "me", content: form.get("content") })
  await fetch("/messages", { method: "POST", body })
}

function Page() {
  const [conversation, setConversation] = useState("abc-123")
  return (
    <>
      <h1>Messages</h1>
      <form action={(form) => setConversation(form.get("conversation"))}>
        <label>
          Conversation <input name="conversation" defaultValue={conversation} />
        </label>
        <button>Show</button>
      </form>
      <MessageList client={client} conversation={conversation} loadMessages={loadMessages} />
      <form action={(form) => say(conversation, form)}>
        <label>
          Message <input name="content" required autoComplete="off" />
        </label>
        <button>Send</button>
      </form>
    </>
  )
}

createRoot(document.getElementById("root")).render(
  <StrictMode>
    <Page />
  </StrictMode>,
)
