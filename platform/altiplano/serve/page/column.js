// One column: a conversation with one model, and how fast it answers.

import { chat } from "./endpoint.js";

export class Column {
  constructor(element) {
    this.name = element.querySelector("h2").textContent;
    this.select = element.querySelector(".model");
    this.talk = element.querySelector(".talk");
    this.numbers = element.querySelector(".numbers");
    this.turns = [];
  }

  /** Offer these models; keep the choice where it is still there. */
  offer(models, preferred) {
    const chosen = models.includes(this.select.value) ? this.select.value : preferred;
    this.select.replaceChildren(...models.map((model) => new Option(model, model, false, model === chosen)));
  }

  clear() {
    this.turns = [];
    this.talk.replaceChildren();
    this.numbers.textContent = "";
  }

  /** Ask and write the answer as it comes. Resolves to what happened, in words. */
  async ask(prompt, settings, signal) {
    const { system, ...sampling } = settings;
    const question = { role: "user", content: prompt };
    const opening = system ? [{ role: "system", content: system }] : [];
    this.#paragraph("user", prompt);
    const answer = this.#paragraph("assistant", "").appendChild(document.createTextNode(""));
    const clock = new Clock();
    let outcome = "answered";
    try {
      const body = { model: this.select.value, messages: [...opening, ...this.turns, question], ...sampling };
      for await (const chunk of chat(body, signal)) {
        const text = chunk.choices[0]?.delta.content;
        if (text) {
          clock.piece();
          this.#write(answer, text);
        }
        if (chunk.usage) clock.tokens = chunk.usage.completion_tokens;
        this.numbers.textContent = clock.line();
      }
    } catch (error) {
      outcome = signal.aborted ? "stopped" : `failed: ${error.message}`;
      if (!signal.aborted) this.#paragraph("bad", error.message);
    }
    this.numbers.textContent = clock.line();
    // An answer that was stopped stays in the conversation; a question that failed does not.
    if (answer.data || outcome === "answered") this.turns.push(question, { role: "assistant", content: answer.data });
    return `${this.name} ${outcome}`;
  }

  #paragraph(kind, text) {
    const made = document.createElement("p");
    made.className = kind;
    made.textContent = text;
    this.talk.append(made);
    this.talk.scrollTop = this.talk.scrollHeight;
    return made;
  }

  #write(node, text) {
    const { talk } = this;
    const following = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    node.appendData(text);
    if (following) talk.scrollTop = talk.scrollHeight;
  }
}

/** Times of one answer. Until the endpoint says how many tokens it was, pieces of text stand for tokens. */
class Clock {
  #start = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;
  tokens = null;

  piece() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  line() {
    if (this.#first === null) return "";
    const tokens = this.tokens ?? this.#pieces;
    // Over the whole answer: a browser gets many tokens in one read, so times between them mean little.
    const rate = (tokens * 1000) / (this.#last - this.#start);
    return `first token ${(this.#first - this.#start).toFixed(0)} ms · ${rate.toFixed(1)} tokens/s · ${tokens} tokens`;
  }
}
