// A client that shares no code with Quartet: only the protos. Uploads a dataset, trains, converts, merges, chats.
// node client.js PROTO_DIR ADDRESS MODEL DATA.jsonl -> one JSON object on stdout
"use strict";
const crypto = require("node:crypto");
const fs = require("node:fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protoDir, address, model, dataFile] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();

function stub(room, service) {
  const definition = loader.loadSync(`quartet/${room}/v1/${room}.proto`, {
    includeDirs: [protoDir], keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true,
  });
  return new (grpc.loadPackageDefinition(definition).quartet[room].v1[service])(address, credentials);
}

const call = (client, method, request) =>
  new Promise((resolve, reject) => client[method](request, (error, answer) => (error ? reject(error) : resolve(answer))));

function crc32c(buffer) {
  let crc = ~0;
  for (const byte of buffer) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (0x82f63b78 & -(crc & 1));
  }
  return ~crc >>> 0;
}

const collect = (stream) =>
  new Promise((resolve, reject) => {
    const messages = [];
    stream.on("data", (message) => messages.push(message));
    stream.on("error", reject);
    stream.on("end", () => resolve(messages));
  });

async function upload(datasets, parent, data) {
  const digest = "sha256:" + crypto.createHash("sha256").update(data).digest("hex");
  const begun = await call(datasets, "BeginUpload", { parent, digest, size_bytes: data.length });
  if (begun.complete) return digest;
  await new Promise((resolve, reject) => {
    const stream = datasets.WriteBlob((error, status) => (error ? reject(error) : resolve(status)));
    for (let at = 0; at < data.length; at += 1 << 16) {
      const chunk = data.subarray(at, at + (1 << 16));
      const finish = at + chunk.length === data.length;
      stream.write({ upload: begun.upload, offset_bytes: at, data: chunk, crc32c: crc32c(chunk), finish });
    }
    stream.end();
  });
  return digest;
}

async function convert(conversion, job) {
  const made = await call(conversion, "CreateConversionJob", { parent: "workspaces/default", conversion_job: job });
  const events = await collect(conversion.WatchConversionJob({ name: made.name }));
  const last = events.at(-1).state;
  if (last.state !== "SUCCEEDED") throw new Error(`${made.name}: ${last.state} ${last.message}`);
}

async function ready(inference, name) {
  for (;;) {
    const endpoint = await call(inference, "GetEndpoint", { name });
    if (endpoint.state === "READY") return;
    if (endpoint.state === "FAILED") throw new Error(endpoint.error.message);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function main() {
  const [datasets, training, conversion, inference] = [
    stub("datasets", "Datasets"), stub("training", "Training"),
    stub("conversion", "Conversion"), stub("inference", "Inference"),
  ];
  const parent = "workspaces/default";
  const dataset = await call(datasets, "CreateDataset", { parent, dataset_id: "node" });
  const digest = await upload(datasets, dataset.name, fs.readFileSync(dataFile));
  const files = [{ path: "data.jsonl", digest }];
  const revision = await call(datasets, "CommitRevision", { parent: dataset.name, files });

  const job = await call(training, "CreateTrainingJob", {
    parent,
    training_job: {
      recipe: "smollm2_135m_qlora_assistant_e1", base_model: model, datasets: [revision.name],
      overrides: { fields: { "schedule.max_steps": { numberValue: 3 }, "data.max_length": { numberValue: 128 } } },
    },
  });
  const events = await collect(training.WatchTrainingJob({ name: job.name }));
  const trained = await call(training, "GetTrainingJob", { name: job.name });
  if (trained.state !== "SUCCEEDED") throw new Error(JSON.stringify(trained.error));

  const [adapter, merged] = [`${parent}/models/node-adapter`, `${parent}/models/node-merged`];
  await convert(conversion, { target_model: adapter, adapter: { checkpoint: trained.result } });
  await convert(conversion, { target_model: merged, merge: { adapter } });
  const endpoint = await call(inference, "CreateEndpoint", { parent, endpoint: { model: merged } });
  await ready(inference, endpoint.name);
  const answer = await collect(inference.Chat({
    endpoint: endpoint.name,
    messages: [{ role: "USER", content: [{ text: "What is the capital of France?" }] }],
    sampling: { temperature: 0, max_tokens: 16 },
  }));
  await call(inference, "DeleteEndpoint", { name: endpoint.name });

  let missing = null;
  try {
    await call(conversion, "GetModel", { name: `${parent}/models/nobody` });
  } catch (error) {
    missing = { code: error.code, details: Boolean(error.metadata.get("grpc-status-details-bin").length) };
  }
  console.log(JSON.stringify({
    rows: revision.row_count,
    sequences: events.map((event) => event.sequence),
    losses: events.filter((event) => event.metric).map((event) => event.metric.values.loss),
    text: answer.map((message) => message.text).join(""),
    usage: answer.at(-1).usage,
    missing,
  }));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
