// What each JavaScript client is tried with, and how a trial is reported: one JSON line with what came of every cell.

import { createRequire } from "node:module";

export const QUESTION = 'Define the noun "river".';
export const ASKED = [{ role: "user", content: QUESTION }];
export const N_TOKENS = 12;
export const LONG = "river ".repeat(4000);
export const WEATHER = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};

export function expect(isTrue, found) {
  if (!isTrue) throw new Error(`found ${JSON.stringify(found)?.slice(0, 200)}`);
}

export function checkWeather(given) {
  const found = typeof given === "string" ? JSON.parse(given) : given;
  expect(["Paris", "Rome"].includes(found.city) && found.days >= 1 && found.days <= 9, found);
}

export async function expectIdle(url) {
  for (const end = Date.now() + 5000; ; ) {
    const text = await (await fetch(`${url}/metrics`)).text();
    const running = text.split("\n").find((line) => line.startsWith("slimoe_num_requests_running"));
    if (Number(running.split(" ").at(-1)) === 0) return;
    expect(Date.now() < end, running);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

export async function report(name, cells) {
  const found = {};
  for (const [cell, run] of Object.entries(cells)) {
    try {
      await run();
      found[cell] = "works";
    } catch (error) {
      found[cell] = `${error?.name}: ${String(error?.message).replaceAll(/\s+/g, " ").slice(0, 300)}`;
    }
  }
  const { dependencies } = createRequire(import.meta.url)("./package.json");
  console.log(JSON.stringify({ client: name, version: dependencies[name], cells: found }));
  process.exit(Object.values(found).some((outcome) => outcome !== "works") ? 1 : 0);
}
