/** The server's HTTP API: relative to the page, so that it works behind a path; errors in the server's own words. */

/** A refusal or failure. `status` is 0 when there was no answer; `retryAfter` is in seconds, or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }

  /** The message with what is known besides it. */
  get full() {
    const facts = [
      this.status ? `status ${this.status}` : null,
      this.code,
      this.retryAfter ? `try again in ${this.retryAfter} s` : null,
    ];
    const known = facts.filter(Boolean).join(", ");
    return known ? `${this.message} (${known})` : this.message;
  }
}

/** What an error's body says. */
function refusal(status, text, retryAfter) {
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch {
    // not JSON: a proxy, perhaps
  }
  const message =
    typeof error?.message === "string" ? error.message : text.slice(0, 300) || "The server refused without a reason.";
  return new ApiError(message, { status, code: error?.code ?? null, retryAfter: Number(retryAfter) || null });
}

/** Dispatches `unauthorized` when the server wants a key, or another one. */
export class Api extends EventTarget {
  #base = new URL(document.querySelector("meta[name=root]").content || "./", document.baseURI);
  #keys;

  constructor(keys) {
    super();
    this.#keys = keys;
  }

  /** The path of one adapter, or of a version of it. */
  static adapter(name) {
    return `v1/adapters/${encodeURIComponent(name)}`;
  }

  #url(path) {
    return new URL(path, this.#base);
  }

  #headers() {
    const key = this.#keys.value;
    return key ? { authorization: `Bearer ${key}` } : {};
  }

  #refused(status, text, retryAfter) {
    if (status === 401) this.dispatchEvent(new Event("unauthorized"));
    return refusal(status, text, retryAfter);
  }

  /** One request. Throws ApiError, or an AbortError when `signal` fires. */
  async request(method, path, { body, signal } = {}) {
    const headers = this.#headers();
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(this.#url(path), {
        method,
        headers,
        signal,
        body: body === undefined ? undefined : JSON.stringify(body),
        cache: "no-store",
        credentials: "same-origin",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.");
    }
    if (!response.ok) throw this.#refused(response.status, await response.text(), response.headers.get("retry-after"));
    return response;
  }

  /** One request; the decoded body. */
  async json(method, path, options) {
    return (await this.request(method, path, options)).json();
  }

  /** An upload with progress (0 to 1). Returns the adapter. Throws as `request` does. */
  upload(form, { progress, signal }) {
    return new Promise((resolve, reject) => {
      const xhr = new XMLHttpRequest();
      xhr.open("POST", this.#url("v1/adapters"));
      for (const [name, value] of Object.entries(this.#headers())) xhr.setRequestHeader(name, value);
      xhr.upload.addEventListener(
        "progress",
        (event) => event.lengthComputable && progress(event.loaded / event.total),
      );
      xhr.addEventListener("error", () => reject(new ApiError("The connection broke during the upload.")));
      xhr.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
      xhr.addEventListener("load", () => {
        if (xhr.status >= 300)
          reject(this.#refused(xhr.status, xhr.responseText, xhr.getResponseHeader("retry-after")));
        else resolve(JSON.parse(xhr.responseText));
      });
      signal.addEventListener("abort", () => xhr.abort());
      xhr.send(form);
    });
  }
}
