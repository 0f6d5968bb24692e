/* The pictures that this browser keeps: an IndexedDB with bounds, shared by all tabs of this page. */

export const MOST_PICTURES = 100;
const MOST_BYTES = 64 * 2 ** 20;

/* What this tab alone keeps; nothing where the browser blocks that. */
export const tab = {
  get(name) { try { return sessionStorage.getItem(name); } catch { return null; } },
  set(name, text) { try { sessionStorage.setItem(name, text); } catch { /* it keeps nothing */ } },
  remove(name) { try { sessionStorage.removeItem(name); } catch { /* it keeps nothing */ } },
};

const NAME = "sdbatch pictures " + location.pathname; // two services may have one address
const TABLE = "pictures";

const result = (request) => new Promise((done, failed) => {
  request.onsuccess = () => done(request.result);
  request.onerror = () => failed(request.error);
});

export class Store {
  /* `onChange` is called when another tab changed what is kept. */
  static async open(onChange) {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    return new Store(await result(request), onChange);
  }

  constructor(database, onChange) {
    this.database = database;
    this.tabs = new BroadcastChannel(NAME);
    this.tabs.onmessage = onChange;
  }

  /* Returns all entries, the newest first; their ids are in the order of time. */
  async all() {
    return (await result(this.table("readonly").getAll())).reverse();
  }

  /* Keeps an entry; removes the oldest ones beyond the bounds, and returns their ids. */
  async add(entry) {
    await result(this.table().put(entry));
    let bytes = 0, pictures = 0;
    const over = (await this.all()).filter(({ file }) =>
      (bytes += file.size) > MOST_BYTES | ++pictures > MOST_PICTURES).map(({ id }) => id);
    await Promise.all(over.map((id) => result(this.table().delete(id))));
    this.tabs.postMessage("");
    return over;
  }

  async remove(id) {
    await result(this.table().delete(id));
    this.tabs.postMessage("");
  }

  async clear() {
    await result(this.table().clear());
    this.tabs.postMessage("");
  }

  table(mode = "readwrite") {
    return this.database.transaction(TABLE, mode).objectStore(TABLE);
  }
}
