CREATE TABLE products (
    sku        text PRIMARY KEY,
    name       text NOT NULL,
    unit_price integer NOT NULL,
    stock      integer NOT NULL CHECK (stock >= 0)
);

CREATE TABLE orders (
    id              uuid PRIMARY KEY,
    customer_id     text NOT NULL,
    idempotency_key text,
    request_digest  bytea NOT NULL,
    lines           jsonb NOT NULL,
    total           integer NOT NULL,
    currency        text NOT NULL,
    payment_token   text NOT NULL,
    status          text NOT NULL,
    charge_id       text,
    reason          text,
    placed_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at     timestamptz,
    UNIQUE (customer_id, idempotency_key)
);

-- What an order's page shows; written in the transaction that changes the status.
CREATE TABLE order_history (
    order_id uuid NOT NULL REFERENCES orders,
    status   text NOT NULL,
    at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (order_id, status)
);

-- Orders whose first task is not on RabbitMQ yet.
CREATE TABLE outbox (
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id uuid NOT NULL
);
