CREATE TABLE balances (
    account text PRIMARY KEY,
    balance numeric(14, 2) NOT NULL
);
