// Publishes one OrderCreated event, without any header, and prints where JetStream stored it.
//
//   NATS_URL=nats://localhost:4222 node publish_order.js <directory of the .proto files> '<order as JSON>'
import { jetstream } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";
import protobuf from "protobufjs";

const [protoDirectory, orderText] = process.argv.slice(2);

const root = new protobuf.Root();
root.resolvePath = (_origin, target) => `${protoDirectory}/${target}`;
await root.load("orders/v1/events.proto", { keepCase: true });
const OrderCreated = root.lookupType("orders.v1.OrderCreated");

const order = JSON.parse(orderText);
const problem = OrderCreated.verify(order);
if (problem) throw new Error(problem);

const connection = await connect({ servers: process.env.NATS_URL ?? "nats://localhost:4222" });
try {
  const stored = await jetstream(connection).publish("ORDER.created", OrderCreated.encode(OrderCreated.create(order)).finish());
  console.log(JSON.stringify({ stream: stored.stream, sequence: stored.seq }));
} finally {
  await connection.drain();
}
