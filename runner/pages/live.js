"use strict";
// A live page: takes its document from the server, follows what changes in it, and says so when the server is gone.
(() => {
  const {page} = Page;
  const KEPT = "view " + location.pathname + location.search;

  Page.document = async () => {
    const {pull_session} = Bokeh.require("client/connection");
    const session = await pull_session(`ws://${location.host}/live/ws`, page.token, "");
    session.document.remove_on_change(session._document_listener);  // data flow one way: nothing of this page goes back
    session.document.config.reconnect_session = false;
    session._connection.socket.addEventListener("close", () => lost());
    return session.document;
  };

  function range() {
    return Page.models("Range1d").find((candidate) => candidate.name === "x");
  }

  // Asks until the server answers again, then begins anew, where somebody looked before.
  async function lost() {
    const notice = document.createElement("p");
    notice.className = "lost";
    notice.setAttribute("role", "status");
    notice.textContent = "The server has ended or cannot be reached; this page goes on when it is back.";
    document.body.append(notice);
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, 2000));
      const answer = await fetch(location.href, {cache: "no-store"}).catch(() => null);
      if (answer?.ok) return again();
    }
  }

  function again() {
    const {start, end} = range() ?? {};
    const axis = document.querySelector("input[name=axis]:checked")?.value;
    const zoomed = start !== page.start || end !== page.end;
    try { sessionStorage.setItem(KEPT, JSON.stringify({axis, zoom: zoomed ? [start, end] : null})); } catch { /* a view less */ }
    location.reload();
  }

  function asBefore() {
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(KEPT)); sessionStorage.removeItem(KEPT); } catch { /* no view kept */ }
    const input = kept?.axis && document.querySelector(`input[name=axis][value="${CSS.escape(kept.axis)}"]`);
    if (input) { input.checked = true; Page.chooseAxis(kept.axis); }
    if (kept?.zoom) range()?.setv({start: kept.zoom[0], end: kept.zoom[1]});
  }

  // Parts come from the same Python code as a page that is written, with every string escaped; scripts in them could not run.
  function replace(name, html) {
    const place = document.querySelector(`[data-part="${CSS.escape(name)}"]`);
    const open = [...place.querySelectorAll("details")].map((details) => details.open);
    const scrolled = [...place.querySelectorAll(".scroll")].map((box) => box.scrollTop);
    const fresh = new DOMParser().parseFromString(html, "text/html").body;
    fresh.querySelectorAll("details").forEach((details, index) => { details.open = open[index] ?? false; });
    place.replaceChildren(...fresh.childNodes);
    place.querySelectorAll(".scroll").forEach((box, index) => { box.scrollTop = scrolled[index] ?? 0; });
  }

  function follow(news) {
    const {part, html, facts} = news.data;
    for (const [index, name] of [...part].entries()) {
      if (name === "reload") return again();
      if (name === "facts") page.axes = JSON.parse(facts[index]).axes;
      else replace(name, html[index]);
    }
    Page.chooseAxis(document.querySelector("input[name=axis]:checked").value, true);
  }

  Page.begin.push(() => {
    asBefore();
    const news = Page.named("news");
    if (news) news.connect(news.properties.data.change, () => follow(news));
  });
})();
