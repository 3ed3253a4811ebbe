/** The types of `lastcall.js`. */

export declare const ENDS: ReadonlySet<string>;

/** How long a client waits for what. */
export interface Bounds {
  /** Of an attempt of a call that is no stream; more than the 30 s that a wait for a turn takes. */
  timeoutS: number;
  /** A stream that is silent for longer is dead. The server sends a comment every 15 s (`heartbeat_interval_s`). */
  silenceS: number;
  /**
   * The first pause between two attempts; each further one is twice as long, by chance up to half of it shorter, and
   * never shorter than `Retry-After`. A stream begins with what its `retry:` says.
   */
  pauseS: number;
  /** Bound of such a pause. */
  pauseMaxS: number;
  /**
   * Bound of all attempts of a call, and of those of a stream since its last event. Times in which the browser is
   * offline do not count. null: no bound.
   */
  patienceS: number | null;
  /** Bound of one event. */
  eventBytesMax: number;
}
export declare const BOUNDS: Readonly<Bounds>;

/** A problem document of the server. */
export interface Problem {
  type?: string;
  title?: string;
  status?: number;
  code: string;
  detail?: string;
  field?: string;
  retry_after_s?: number;
  turn_id?: string;
  state?: string;
  text?: string;
}

export declare class LastcallError extends Error {
  constructor(
    detail: string,
    more: {
      code: string;
      status?: number | null;
      title?: string;
      requestId?: string | null;
      retryAfterS?: number | null;
      problem?: Partial<Problem>;
      cause?: unknown;
    },
  );
  /** Of the answer; null if there was none. */
  readonly status: number | null;
  /**
   * Of the server (`turn_in_progress`), or of this client: `unreachable`, `timeout`, `cut`, `malformed_answer`,
   * `redirected`, `event_too_large`; `unknown` for an answer that is no problem document, as of a proxy.
   */
  readonly code: string;
  readonly title: string;
  readonly detail: string;
  /** The request's id in the server's log. */
  readonly requestId: string | null;
  readonly retryAfterS: number | null;
  /** The turn that the answer names, e.g. the one that is in the way. */
  readonly turnId: string | null;
  readonly problem: Partial<Problem>;
  readonly isPassing: boolean;
}

/** The client waits before it tries again; `attempt` counts from 1 and begins anew with each answer. */
export interface Waiting {
  attempt: number;
  delayS: number;
  error: LastcallError;
  isOffline: boolean;
}

export interface Usage {
  input_tokens: number;
  output_tokens: number;
  reasoning_tokens: number;
  cached_tokens?: number;
}

export interface Session {
  id: string;
  created_at: string;
  last_accessed_at: string;
  updated_at: string;
  expires_at: string;
  idle_timeout_s: number;
  title: string | null;
  model: string | null;
  system_message: string | null;
  temperature: number | null;
  max_output_tokens: number | null;
  metadata: Record<string, string>;
  status: string;
  head: string | null;
  message_count: number;
  usage: Usage;
  owner?: string;
  /** Where the words of a search are. */
  match?: { turn_id: string | null; snippet: string };
}

export interface Failure {
  code: string;
  message: string;
  param?: string;
}

export interface Turn {
  id: string;
  session_id: string;
  parent: string | null;
  state: string;
  reason: string | null;
  error: Failure | null;
  model: string;
  input: string;
  /** The reply so far. */
  text: string;
  finish_reason: string | null;
  usage: Usage | null;
  left_out: Record<string, unknown> | null;
  created_at: string;
  started_at: string | null;
  ended_at: string | null;
  siblings?: { place: number; count: number };
  is_head?: boolean;
  items?: Array<Record<string, unknown>>;
  events_deleted?: true;
  stored?: false;
  on_interrupt?: "retry" | "continue";
  attempt?: number;
}

export interface TreeTurn {
  id: string;
  parent: string | null;
  state: string;
  created_at: string;
  ended_at: string | null;
}

export interface Message {
  id: string;
  turn_id: string;
  role: string;
  text: string;
  created_at: string;
  type?: "function_call" | "function_call_output";
  call_id?: string;
  name?: string;
  arguments?: string;
  complete?: boolean;
  output?: string;
}

export interface Page<T> {
  data: T[];
  next: string | null;
  count?: number;
  partial?: boolean;
}

/**
 * The end of a turn. If the server has no events any more, it comes from the turn's record: then it has no `seq`,
 * `replaces` says why, and `text` is the whole reply, in place of what was shown.
 */
export interface EndFields {
  seq?: number;
  text_length: number;
  usage?: Usage | null;
  replaces?: "events_lost" | "events_deleted";
  text?: string;
  stored?: false;
}

export type Event =
  | { type: "turn.queued"; seq: number; session_id: string; turn_id: string }
  | { type: "turn.started"; seq: number; session_id: string; turn_id: string; model: string }
  | { type: "turn.delta"; seq: number; text: string }
  | { type: "turn.reasoning"; seq: number; text: string }
  | { type: "turn.call"; seq: number; item: number; id: string; call_id: string; name: string }
  | { type: "turn.arguments"; seq: number; item: number; text: string }
  | { type: "turn.resumed"; seq: number; attempt: number; mode: "retry" | "continue"; text_length: number }
  | TurnEnd;

export type TurnEnd =
  | ({ type: "turn.completed"; finish_reason: string } & EndFields)
  | ({ type: "turn.failed"; error: Failure } & EndFields)
  | ({ type: "turn.cancelled"; reason: string | null } & EndFields)
  | ({ type: "turn.interrupted"; reason: string | null } & EndFields);

export interface CallOptions {
  /** Ends the call: its promise is rejected with the signal's reason. A POST may have been done all the same. */
  signal?: AbortSignal;
  /** Called before each pause between two attempts, in place of the client's. */
  onWait?: (waiting: Waiting) => void;
}

export interface KeyedOptions extends CallOptions {
  /** Names this call, also after a reload of your page: made if left out. */
  idempotencyKey?: string;
}

export interface StreamOptions extends CallOptions {
  /** Called when the stream is open, first or again. */
  onOpen?: () => void;
}

export interface SessionFields {
  title?: string | null;
  model?: string | null;
  system_message?: string | null;
  temperature?: number | null;
  max_output_tokens?: number | null;
  metadata?: Record<string, string>;
  idle_timeout_s?: number;
}

export interface TurnFields {
  model?: string | null;
  system_message?: string | null;
  temperature?: number | null;
  max_output_tokens?: number | null;
  tools?: Array<Record<string, unknown>>;
  tool_choice?: string | Record<string, unknown> | null;
  parallel_tool_calls?: boolean | null;
  top_p?: number | null;
  text_format?: Record<string, unknown> | null;
  reasoning_effort?: string | null;
  on_conflict?: "reject" | "queue" | "supersede";
  /** `continue` if left out: the turn outlives its stream. With `cancel` a lost connection ends it, too. */
  on_disconnect?: "cancel" | "continue";
  on_interrupt?: "fail" | "retry" | "continue";
}

export interface StartOptions extends KeyedOptions, StreamOptions, TurnFields {
  /** The turn to follow: the session's head if left out, none if null. */
  parent?: string | null;
  /** Sent as `X-Request-ID`. */
  requestId?: string;
}

export interface ListOptions extends CallOptions {
  status?: string;
  q?: string;
  metadata?: Record<string, string>;
}

export type Input = string | Array<Record<string, unknown>>;

export declare class Client {
  /** `url` is the server's address, with the prefix that a proxy adds; in a page it may be relative. */
  constructor(
    url: string,
    options?: {
      /** The key, or what gives it: it is asked before each request. */
      apiKey?: string | (() => string | Promise<string>);
      owner?: string;
      bounds?: Partial<Bounds>;
      onWait?: (waiting: Waiting) => void;
      fetch?: typeof fetch;
    },
  );
  readonly url: string;
  readonly bounds: Bounds;

  createSession(options?: { id?: string } & SessionFields & KeyedOptions): Promise<Session>;
  getSession(sessionId: string, options?: CallOptions): Promise<Session>;
  sessionEtag(sessionId: string, options?: CallOptions): Promise<[Session, string | null]>;
  listSessions(options?: ListOptions & { limit?: number; after?: string; count?: boolean }): Promise<Page<Session>>;
  sessions(options?: ListOptions): Pages<Session>;
  search(q: string, options?: ListOptions): Pages<Session>;
  updateSession(
    sessionId: string,
    options: SessionFields & { head?: string | null; seen_head?: string; ifMatch?: string } & CallOptions,
  ): Promise<Session>;
  renameSession(sessionId: string, title: string | null, options?: { ifMatch?: string } & CallOptions): Promise<Session>;
  switchTo(
    sessionId: string,
    turnId: string | null,
    options?: { seenHead?: string; ifMatch?: string } & CallOptions,
  ): Promise<Session>;
  deleteSession(sessionId: string, options?: { ifMatch?: string } & CallOptions): Promise<void>;
  forkSession(sessionId: string, options?: { at?: string; id?: string } & KeyedOptions): Promise<Session>;

  messages(sessionId: string, options?: CallOptions): Pages<Message>;
  addMessages(sessionId: string, items: Array<Record<string, unknown>>, options?: KeyedOptions): Promise<Message[]>;
  deleteMessage(sessionId: string, messageId: string, options?: CallOptions): Promise<void>;

  startTurn(
    sessionId: string,
    message: Input,
    options?: TurnFields & { parent?: string | null } & KeyedOptions,
  ): Promise<Turn>;
  stream(sessionId: string, message: Input, options?: StartOptions): TurnStream;
  chat(
    message: string,
    options?: { sessionId?: string; requestId?: string } & Pick<TurnFields, "on_disconnect" | "on_interrupt"> &
      KeyedOptions &
      StreamOptions,
  ): TurnStream;
  retry(sessionId: string, turnId: string, options?: Omit<StartOptions, "parent">): TurnStream;
  edit(turn: Turn, message: Input, options?: Omit<StartOptions, "parent">): TurnStream;
  events(sessionId: string, turnId: string, options?: { after?: number; text?: string } & StreamOptions): TurnStream;
  getTurn(sessionId: string, turnId: string, options?: { waitS?: number } & CallOptions): Promise<Turn>;
  waitTurn(sessionId: string, turnId: string, options?: CallOptions): Promise<Turn>;
  turns(sessionId: string, options?: CallOptions): Pages<Turn>;
  siblings(turn: Turn, options?: CallOptions): Pages<Turn>;
  path(sessionId: string, options?: { head?: string } & CallOptions): Promise<Turn[]>;
  tree(sessionId: string, options?: CallOptions): Pages<TreeTurn>;
  cancel(sessionId: string, turnId: string, options?: CallOptions): Promise<Turn>;
  deleteTurn(sessionId: string, turnId: string, options?: CallOptions): Promise<void>;
}

export declare class Pages<T> implements AsyncIterable<T> {
  private constructor();
  [Symbol.asyncIterator](): AsyncGenerator<T, void, undefined>;
  collect(): Promise<T[]>;
}

export declare class TurnStream implements AsyncIterable<Event> {
  private constructor();
  /** Both known from the answer's head on. */
  readonly sessionId: string | null;
  readonly turnId: string | null;
  /** Of the last event that was yielded; 0 before the first one. */
  readonly seq: number;
  /** The reply so far: of the events that were yielded. */
  readonly text: string;
  /** The event that ended the turn, once it was yielded. */
  readonly end: TurnEnd | null;
  [Symbol.asyncIterator](): AsyncGenerator<Event, void, undefined>;
  finish(): Promise<TurnEnd | null>;
  cancel(options?: CallOptions): Promise<Turn>;
}
