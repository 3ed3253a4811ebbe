// Runs before the page is drawn, so that a chosen theme does not flash: no module, because those run later.
{
  const chosen = localStorage.getItem("lastcall.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
