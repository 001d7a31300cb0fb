/** The view in the panel: draws what the extension says, and says what the user does. Holds nothing but the text being typed. */
import type { Chip, FromView, Offer, ToView, Turn } from "../messages";
import { blocks } from "./markdown";

interface Host {
  postMessage(message: FromView): void;
  getState(): { text: string } | undefined;
  setState(state: { text: string }): void;
}

declare function acquireVsCodeApi(): Host;

const NEAR_PX = 40;
const MOST_OFFERED = 8;
const STARTERS = ["explain_symbol", "tests", "review"];
const host = acquireVsCodeApi();
const talk = element<HTMLElement>("talk");
const form = element<HTMLFormElement>("ask");
const text = element<HTMLTextAreaElement>("text");
const send = element<HTMLButtonElement>("send");
const chips = element<HTMLElement>("chips");
const list = element<HTMLElement>("offers");
const drawn = new Map<string, Drawn>();
let shown: { turns: Turn[]; offers: Offer[] } = { turns: [], offers: [] };
let chosen = 0;

function element<Kind extends HTMLElement>(id: string): Kind {
  return document.getElementById(id) as Kind;
}

/** A new element; `words` are text, whatever is in them. */
function make<Name extends keyof HTMLElementTagNameMap>(name: Name, kind: string, words = ""): HTMLElementTagNameMap[Name] {
  const made = document.createElement(name);
  made.className = kind;
  made.textContent = words;
  return made;
}

/** One question and its answer on the screen. */
class Drawn {
  readonly root = make("article", "turn");
  private readonly news = make("p", "news");
  private readonly question = make("div", "question");
  private readonly answer = make("div", "answer");
  private readonly below = make("div", "below");
  private html: string[] = [];

  constructor(readonly id: string) {
    this.root.append(this.news, this.question, this.answer, this.below);
  }

  draw(turn: Turn): void {
    const isRunning = turn.state === "waiting" || turn.state === "answering";
    this.root.dataset.state = turn.state;
    this.root.setAttribute("aria-busy", String(isRunning));
    this.news.textContent = turn.news;
    this.question.replaceChildren(make("p", "", turn.question), ...turn.about.map((label) => make("span", "about", label)));
    this.write(turn.answer);
    this.below.replaceChildren(...turn.notes.map((note) => make("p", "note", note)));
    if (turn.state === "waiting") {
      this.below.append(make("p", "waiting", "Thinking"));
    }
    if (turn.state === "stopped") {
      this.below.append(make("p", "note", "Stopped."));
    }
    if (turn.state === "failed") {
      this.below.append(make("p", "problem", turn.problem));
    }
    if (turn.state === "failed" || turn.state === "stopped") {
      const again = make("button", "again", "Ask again");
      again.type = "button";
      again.addEventListener("click", () => host.postMessage({ type: "again", id: this.id }));
      this.below.append(again);
    }
  }

  /** The answer as far as it came: blocks that are as they were stay, with what is selected or focused in them. */
  write(answer: string): void {
    const html = blocks(answer);
    const same = html.findIndex((block, index) => block !== this.html[index]);
    const first = same < 0 ? html.length : same;
    while (this.answer.children.length > first) {
      this.answer.lastElementChild?.remove();
    }
    for (const block of html.slice(first)) {
      const made = make("div", "block");
      made.innerHTML = block; // blocks() lets nothing of the model's through as markup
      this.answer.append(made);
    }
    this.html = html;
    if (answer) {
      this.below.querySelector(".waiting")?.remove();
    }
  }
}

/** Draws, and stays at the end where the end was in sight. */
function followed(draw: () => void): void {
  const isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < NEAR_PX;
  draw();
  if (isAtEnd) {
    talk.scrollTop = talk.scrollHeight;
  }
}

function drawTurns(turns: Turn[], last: string | undefined): void {
  const there = new Set(turns.map((turn) => turn.id));
  for (const [id, old] of drawn) {
    if (!there.has(id)) {
      old.root.remove();
      drawn.delete(id);
    }
  }
  for (const turn of turns) {
    let one = drawn.get(turn.id);
    if (!one) {
      one = new Drawn(turn.id);
      drawn.set(turn.id, one);
      talk.append(one.root);
    }
    one.draw(turn);
  }
  talk.querySelector(".welcome")?.remove();
  if (!turns.length) {
    talk.append(welcome());
  } else if (turns.at(-1)?.id !== last) {
    talk.scrollTop = talk.scrollHeight;
  }
}

function welcome(): HTMLElement {
  const made = make("section", "welcome");
  made.append(make("h2", "", "Ask about your code"), make("p", "", "What you ask goes to your own model, and nowhere else."));
  for (const name of STARTERS) {
    const offer = shown.offers.find((one) => one.name === name);
    if (offer) {
      const button = make("button", "starter", offer.title);
      button.type = "button";
      button.addEventListener("click", () => host.postMessage({ type: "ask", text: `/${name}` }));
      made.append(button);
    }
  }
  return made;
}

function drawChips(given: Chip[]): void {
  const focused = (document.activeElement as HTMLElement | null)?.dataset.key;
  chips.replaceChildren(
    ...given.map(({ key, label, isOn }) => {
      const chip = make("button", "chip", label);
      chip.type = "button";
      chip.dataset.key = key;
      chip.setAttribute("aria-pressed", String(isOn));
      chip.title = isOn ? `The question is about ${label}. Press to leave it out.` : `Press to ask about ${label}.`;
      chip.addEventListener("click", () => host.postMessage({ type: "chip", key }));
      return chip;
    }),
  );
  if (focused !== undefined) {
    ([...chips.children] as HTMLElement[]).find((chip) => chip.dataset.key === focused)?.focus();
  }
}

function isRunning(): boolean {
  const last = shown.turns.at(-1)?.state;
  return last === "waiting" || last === "answering";
}

function drawButton(): void {
  const running = isRunning();
  send.className = running ? "stop" : "send";
  send.title = running ? "Stop (Escape)" : "Ask (Enter)";
  send.setAttribute("aria-label", send.title);
  send.disabled = !running && !text.value.trim();
}

/** The actions that what is typed begins. */
function offered(): Offer[] {
  const typed = /^\/(\w*)$/.exec(text.value)?.[1];
  return typed === undefined ? [] : shown.offers.filter((offer) => offer.name.startsWith(typed)).slice(0, MOST_OFFERED);
}

function drawOffers(): void {
  const found = offered();
  chosen = Math.max(0, Math.min(chosen, found.length - 1));
  list.hidden = !found.length;
  list.replaceChildren(
    ...found.map((offer, index) => {
      const row = make("li", "offer");
      row.id = `offer-${index}`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(index === chosen));
      row.append(make("b", "", `/${offer.name}`), make("span", "", offer.title));
      row.addEventListener("mousedown", (event) => {
        event.preventDefault();
        take(offer);
      });
      return row;
    }),
  );
  if (found.length) {
    text.setAttribute("aria-activedescendant", `offer-${chosen}`);
  } else {
    text.removeAttribute("aria-activedescendant");
  }
}

function take(offer: Offer): void {
  text.value = `/${offer.name} `;
  typed();
}

function typed(): void {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  host.setState({ text: text.value });
  drawOffers();
  drawButton();
}

function submit(): void {
  const question = text.value.trim();
  if (isRunning()) {
    host.postMessage({ type: "stop" });
  } else if (question) {
    host.postMessage({ type: "ask", text: question });
    text.value = "";
    typed();
  }
}

/** What a key does while actions are offered; says whether it did something. */
function pressedAmongOffers(key: string): boolean {
  const found = offered();
  const steps: { [key: string]: number } = { ArrowDown: 1, ArrowUp: -1 };
  if (!found.length || list.hidden) {
    return false;
  }
  if (key in steps) {
    chosen = (chosen + steps[key] + found.length) % found.length;
    drawOffers();
  } else if (key === "Escape") {
    list.hidden = true;
  } else if ((key === "Enter" || key === "Tab") && text.value !== `/${found[chosen].name}`) {
    take(found[chosen]);
  } else {
    return false;
  }
  return true;
}

text.addEventListener("keydown", (event) => {
  if (event.isComposing) {
    return;
  }
  if (pressedAmongOffers(event.key)) {
    event.preventDefault();
  } else if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    if (!isRunning()) {
      submit();
    }
  } else if (event.key === "ArrowUp" && !text.value && shown.turns.length) {
    event.preventDefault();
    text.value = shown.turns.at(-1)?.question ?? "";
    typed();
  }
});
text.addEventListener("input", typed);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented && isRunning()) {
    host.postMessage({ type: "stop" });
  }
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
talk.addEventListener("click", (event) => {
  const button = (event.target as HTMLElement).closest<HTMLButtonElement>("button.insert, button.copy");
  const code = button?.closest(".code")?.querySelector("code")?.textContent;
  if (button && code) {
    const isCopy = button.classList.contains("copy");
    host.postMessage({ type: isCopy ? "copy" : "insert", code });
    if (isCopy) {
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    }
  }
});
window.addEventListener("message", ({ data }: MessageEvent<ToView>) => {
  if (data.type === "focus") {
    text.focus();
  } else if (data.type === "answer") {
    followed(() => drawn.get(data.id)?.write(data.answer));
  } else {
    followed(() => {
      const last = shown.turns.at(-1)?.id;
      shown = data;
      drawTurns(data.turns, last);
      drawChips(data.chips);
      drawOffers();
      drawButton();
    });
  }
});

text.value = host.getState()?.text ?? "";
typed();
host.postMessage({ type: "ready" });
