// Elements and icons. The page never makes HTML of a text: elements are made here, and texts are text nodes.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. `props`: `class`, `text`, `on` (listeners by event), `data` (the dataset), properties like `value` and
 * `disabled`, and attributes like `aria-label`. null and false are left out, and so are such children.
 */
export function h(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") made.className = value;
    else if (name === "text") made.textContent = value;
    else if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name in made && !name.startsWith("aria-") && name !== "role" && name !== "list") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((it) => it !== null && it !== undefined && it !== false));
  return made;
}

/** An element of SVG, with attributes. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const ICONS = {
  back: "M15 5l-7 7 7 7",
  branch: "M6 4v10a4 4 0 0 0 4 4h8M6 9h6a4 4 0 0 1 4 4M15 15l3 3-3 3",
  check: "M5 12.500l4.500 4.500L19 7",
  clock: "M12 7v5l3.500 2M12 3a9 9 0 1 1 0 18 9 9 0 0 1 0-18z",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  cut: "M20 4L8.500 15.500M4 8.500a2.500 2.500 0 1 1 5 0 2.500 2.500 0 0 1-5 0zM4 17.500a2.500 2.500 0 1 1 5 0 2.500 2.500 0 0 1-5 0zM8.500 10.500L20 20",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20l1-4.500L16 4.500l3.500 3.500L8.500 19zM14 6.500l3.500 3.500",
  help: "M9.500 9.500a2.500 2.500 0 1 1 3.800 2.100c-.8.5-1.300 1-1.300 1.900M12 17v.010M12 3a9 9 0 1 1 0 18 9 9 0 0 1 0-18z",
  key: "M14.500 3.500a6 6 0 1 1-4.200 10.200L4 20v-3l1.500-1.500H8V13h2l.3-.3A6 6 0 0 1 14.500 3.500zM16.500 7.500v.010",
  left: "M14 6l-6 6 6 6",
  list: "M4 6h16M4 12h16M4 18h16",
  minus: "M5 12h14",
  moon: "M19.500 14.500A8 8 0 0 1 9.500 4.500a8 8 0 1 0 10 10z",
  plus: "M12 5v14M5 12h14",
  retry: "M19 8a8 8 0 1 0 1 6M20 4v4.500h-4.500",
  right: "M10 6l6 6-6 6",
  search: "M10.500 4a6.500 6.500 0 1 1 0 13 6.500 6.500 0 0 1 0-13zM15.500 15.500L20 20",
  send: "M5 12h13M12 6l6 6-6 6",
  stop: "M7 7h10v10H7z",
  sun: "M12 8a4 4 0 1 1 0 8 4 4 0 0 1 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.500 1.500M17.500 17.500L19 19M5 19l1.500-1.500M17.500 6.500L19 5",
  trash: "M5 7h14M9.500 7V4h5v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  wait: "M7 4h10M7 20h10M8 4c0 4 3 5 4 8 1-3 4-4 4-8M8 20c0-4 3-5 4-8 1 3 4 4 4 8",
};

/** An icon of this page, hidden from screen readers: what it stands for is said in words beside it. */
export function icon(name) {
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A button. Without `text` it shows only the icon, and `label` is its name. */
export function button({ text, label, icon: name, kind = "", press, ...props }) {
  const isBare = text === undefined;
  return h(
    "button",
    {
      type: "button",
      class: `button ${kind}${isBare ? " icon-button" : ""}`,
      "aria-label": isBare ? label : null,
      title: label ?? null,
      on: press ? { click: press } : {},
      ...props,
    },
    name ? icon(name) : null,
    isBare ? null : h("span", { text }),
  );
}

/**
 * A window over the page, closed with Escape. Returns what was answered: the fields' values, or null.
 * The focus goes back to where it was.
 */
export function ask({ title, words, fields = [], yes = "OK", no = "Cancel", kind = "primary", body = null }) {
  return new Promise((resolve) => {
    const inputs = fields.map(({ name, label, ...props }) => {
      const input = h("input", { class: "input", name, autocomplete: "off", spellcheck: false, ...props });
      return h("label", { class: "field" }, h("span", { text: label }), input);
    });
    const form = h(
      "form",
      { method: "dialog" },
      h("h2", { text: title, id: "dialog-title" }),
      words ? h("p", { text: words }) : null,
      body,
      inputs,
      h(
        "div",
        { class: "actions" },
        no ? h("button", { class: "button", type: "button", on: { click: () => dialog.close("") } }, no) : null,
        h("button", { class: `button ${kind}`, value: "yes" }, yes),
      ),
    );
    const dialog = h("dialog", { "aria-labelledby": "dialog-title" }, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      dialog.close("yes");
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes" ? Object.fromEntries(new FormData(form)) : null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
