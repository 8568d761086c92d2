CREATE TABLE customers (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    email text NOT NULL,
    card_number text,
    password_hash text NOT NULL
);
ALTER TABLE customers REPLICA IDENTITY FULL;
