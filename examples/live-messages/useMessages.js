import { useEffect, useState } from "react"

// A channel of a name can be opened again when the last one of that name is gone.
let lastRemoved = Promise.resolve()

/**
 * The messages of a conversation: those that there are, and then each as it is committed.
 *
 * `loadMessages(conversation)` asks your own server for the rows.
 * Returns `{ messages, isLive }`, the messages in the order of their ids.
 */
export function useMessages(client, conversation, loadMessages) {
  const [rows, setRows] = useState(new Map())
  const [isLive, setIsLive] = useState(false)

  useEffect(() => {
    let isOver = false
    let channel = null
    let loaded = new Map()
    const changed = new Map() // what came since, which is newer than what was loaded

    // The client sends this object with each join, and as it is by then. `since` is walstream's:
    // the position of the last change, behind which the channel goes on.
    const asked = {
      event: "*",
      schema: "public",
      table: "messages_v2",
      filter: `conversation_id=eq.${quoted(conversation)}`,
      leaving: true, // tell also of messages that are moved to another conversation
      since: null,
    }

    const show = () => {
      const all = new Map([...loaded, ...changed])
      for (const [id, row] of all) if (row === null) all.delete(id)
      setRows(all)
    }

    const load = async () => {
      changed.clear()
      const found = await loadMessages(conversation)
      if (isOver) return
      loaded = new Map(found.map((row) => [row.id, row]))
      show()
    }

    const take = ({ eventType, new: row, old }) => {
      asked.since = row.$position ?? old.$position
      if (eventType === "DELETE" || row.$leaving) changed.set(row.id ?? old.id, null)
      else changed.set(row.id, row)
      show()
    }

    const open = () => {
      channel = client
        .channel(`conversation:${conversation}`)
        .on("postgres_changes", asked, take)
        // What was missed is not kept any more; in version 1.0.0 the status of that is "ok".
        .on("system", {}, ({ message }) => message.startsWith("Changes may be missing") && load())
        .subscribe((status) => {
          if (isOver) return
          setIsLive(status === "SUBSCRIBED")
          // Who has a position gets what was missed; who has none yet loads the rows again.
          if (status === "SUBSCRIBED" && asked.since === null) load()
        })
    }

    lastRemoved.then(() => isOver || open())
    return () => {
      isOver = true
      if (channel) lastRemoved = client.removeChannel(channel)
    }
  }, [client, conversation, loadMessages])

  return { messages: [...rows.values()].sort((one, other) => one.id - other.id), isLive }
}

// In double quotes a value of a filter may have any character in it.
function quoted(value) {
  return `"${value.replace(/[\\"]/g, "\\$&")}"`
}
