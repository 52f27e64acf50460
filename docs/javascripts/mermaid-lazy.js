// The theme asks for a global `mermaid` and would fetch it from elsewhere. This stand-in loads our own copy at the first diagram.
(() => {
  const address = new URL("../assets/vendor/mermaid.min.js", document.currentScript.src).href;
  let settings = { startOnLoad: false };
  let loading;
  const load = () =>
    (loading ??= new Promise((resolve, reject) => {
      const standIn = window.mermaid;
      const script = document.createElement("script");
      script.src = address;
      script.onload = () => {
        const mermaid = window.mermaid;
        window.mermaid = standIn;
        mermaid.initialize({ ...settings, themeCSS: `${settings.themeCSS ?? ""} .labelBkg { background: none }` }); // its grey shows beside a label
        resolve(mermaid);
      };
      script.onerror = reject;
      document.head.append(script);
    }));
  window.mermaid = {
    initialize: (given) => { settings = given; },
    render: (...given) => load().then((mermaid) => mermaid.render(...given)),
  };
})();
