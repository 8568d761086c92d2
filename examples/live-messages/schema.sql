CREATE TABLE messages_v2 (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    conversation_id text NOT NULL,
    sender text NOT NULL,
    content text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- A message that is deleted is found by its conversation, which is not in its key.
ALTER TABLE messages_v2 REPLICA IDENTITY FULL;
