// Chooses dark or light before anything is drawn. The choice is kept; without one the system's holds.
(() => {
  const NAME = "slimoe.theme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let kept = null;
  try {
    kept = localStorage.getItem(NAME);
  } catch {
    // A browser that keeps nothing follows the system.
  }
  const chosen = () => (kept === "dark" || kept === "light" ? kept : system.matches ? "dark" : "light");
  const apply = () => {
    root.dataset.theme = chosen();
    document.dispatchEvent(new Event("theme"));
  };
  window.slimoeTheme = {
    current: chosen,
    flip() {
      kept = chosen() === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(NAME, kept);
      } catch {
        // It holds until the page is closed.
      }
      apply();
    },
  };
  system.addEventListener("change", apply);
  apply();
})();
