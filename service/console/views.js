// The views of the header, in its order.
//
// A view is a module with `mount(root, context)`, which shows it in the empty element `root`. It ends with
// `context.signal`: give the signal to listeners and calls, and nothing is left.

export const VIEWS = [
  { id: "chat", title: "Chat", load: () => import("./chat.js") },
  { id: "tree", title: "Tree", load: () => import("./tree.js") },
  { id: "shutdowns", title: "Shutdowns", load: () => import("./shutdowns.js") },
  { id: "metrics", title: "Metrics", load: () => import("./metrics.js") },
];
