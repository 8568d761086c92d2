import { useMessages } from "./useMessages.js"

/** The messages of a conversation, live. */
export function MessageList({ client, conversation, loadMessages }) {
  const { messages, isLive } = useMessages(client, conversation, loadMessages)
  return (
    <>
      <p role="status" className={isLive ? "live" : ""}>
        {isLive ? "live" : "connecting"}
      </p>
      <ol aria-label="Messages">
        {messages.map(({ id, sender, content }) => (
          <li key={id}>
            <strong>{sender}</strong> {content}
          </li>
        ))}
      </ol>
    </>
  )
}
