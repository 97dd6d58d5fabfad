// The page: what the buttons do.

import { Column } from "./column.js";
import { ask, problem, savedKey, useKey } from "./endpoint.js";
import { watch } from "./service.js";

const byId = (id) => document.getElementById(id);
const columns = [...document.querySelectorAll(".column")].map((element) => new Column(element));
let running = null;

function showState(text, bad) {
  byId("state").textContent = text;
  byId("state").classList.toggle("bad", bad);
}

/** Fill the model menus: A gets the champion where there is one, B the newest other model. */
async function loadModels() {
  const response = await ask("v1/models");
  if (!response.ok) {
    byId("key-problem").textContent = await problem(response);
    byId("key").focus();
    return;
  }
  byId("key-problem").textContent = "";
  const models = (await response.json()).data.map((model) => model.id);
  const first = models.includes("champion") ? "champion" : models[0];
  const second = models.includes("challenger") ? "challenger" : (models.filter((model) => model !== first)[0] ?? first);
  columns[0].offer(models, first);
  columns[1].offer(models, second);
}

function settings() {
  const seed = byId("seed").value;
  return {
    system: byId("system").value.trim(),
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    ...(seed !== "" && { seed: Number(seed) }),
  };
}

async function send() {
  const prompt = byId("prompt").value.trim();
  if (!prompt || running) return;
  running = new AbortController();
  byId("prompt").value = "";
  busy(true);
  const outcomes = await Promise.all(columns.map((column) => column.ask(prompt, settings(), running.signal)));
  running = null;
  busy(false);
  byId("announce").textContent = outcomes.join(", ");
}

function busy(is) {
  byId("send").disabled = byId("fresh").disabled = is;
  byId("stop").disabled = !is;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("fresh").addEventListener("click", () => {
  for (const column of columns) column.clear();
  byId("prompt").focus();
});
byId("key").addEventListener("change", (event) => {
  useKey(event.target.value);
  loadModels();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
});

byId("key").value = savedKey();
byId("prompt").focus();
watch(byId("service"), showState);
loadModels();
