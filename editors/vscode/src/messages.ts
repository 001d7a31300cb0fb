/** What the two halves of the panel tell each other: the extension holds the conversation, the view shows it. */

export interface Turn {
  /** Also the id of its stream. */
  id: string;
  question: string;
  /** What it refers to, in words. */
  about: string[];
  /** Markdown by the model, as far as it came. Nothing in it is trusted. */
  answer: string;
  notes: string[];
  state: "waiting" | "answering" | "done" | "stopped" | "failed";
  /** Why it failed. */
  problem: string;
  /** What happened before it was asked. */
  news: string;
}

/** Something that the next question can refer to. */
export interface Chip {
  key: string;
  label: string;
  isOn: boolean;
}

/** An action that may stand behind a slash. */
export interface Offer {
  name: string;
  title: string;
  asks: string;
}

export type ToView =
  | { type: "shown"; turns: Turn[]; chips: Chip[]; offers: Offer[] }
  | { type: "answer"; id: string; answer: string }
  | { type: "focus" };

export type FromView =
  | { type: "ready" | "stop" }
  | { type: "ask"; text: string }
  | { type: "again"; id: string }
  | { type: "chip"; key: string }
  | { type: "insert" | "copy"; code: string };
