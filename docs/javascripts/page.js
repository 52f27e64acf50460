// After each page, instant navigation included: what is wider than the page can be scrolled by keyboard, and the search has a name.
document$.subscribe(({ body }) => {
  for (const scrolls of body.querySelectorAll(".arithmatex, .md-typeset__scrollwrap, .highlight pre, .moe-scroll")) {
    if (scrolls.scrollWidth > scrolls.clientWidth && !scrolls.querySelector("a, button, input, code[tabindex]")) scrolls.tabIndex = 0;
  }
  body.querySelector("[data-md-component=search] [role=dialog], .md-search[role=dialog]")?.setAttribute("aria-label", "Search");
});
