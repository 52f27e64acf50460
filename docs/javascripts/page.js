// After each page, instant navigation included: what is wider than its place is marked, so that it shows that it can be scrolled, and can be
// reached by keyboard; the first column of such a table stays while the others pass, if it leaves them half of the width; and the search has
// a name. What is folded or in a hidden tab has no width yet, and a phone can be turned: so sizes are watched.
const SCROLLERS = "div.arithmatex, .md-typeset__scrollwrap, .moe-scroll, .md-typeset pre > code";

const sizes = new ResizeObserver((changes) => {
  for (const { target } of changes) {
    const cut = target.scrollWidth > target.clientWidth;
    target.toggleAttribute("data-cut", cut);
    const column = target.querySelector(":scope > .md-typeset__table th")?.offsetWidth;
    const kept = cut && column <= target.clientWidth / 2;
    target.toggleAttribute("data-kept", kept);
    if (kept) target.style.setProperty("--kept", `${column}px`);
    if (!cut) target.removeAttribute("tabindex");
    else if (target.matches("code") || !target.querySelector("a, button, input")) target.tabIndex = 0;
  }
});

document$.subscribe(({ body }) => {
  sizes.disconnect();
  for (const scrolls of body.querySelectorAll(SCROLLERS)) sizes.observe(scrolls);
  body.querySelector("[data-md-component=search] [role=dialog], .md-search[role=dialog]")?.setAttribute("aria-label", "Search");
});
