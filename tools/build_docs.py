"Build the site into _docs: with Quarto when it is installed, else with smalldocs. Also writes README.md from nbs/index.ipynb."
from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROC, SITE, DOCS = ROOT / "_proc", ROOT / "_proc" / "_docs", ROOT / "_docs"


def readme() -> str:
    "README.md: the cells of nbs/index.ipynb as Markdown, with links to chapters pointing at the notebooks."
    parts = ["<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook. -->"]
    for c in nbformat.read(ROOT / "nbs" / "index.ipynb", 4).cells:
        body = "\n".join(s for s in c.source.splitlines() if not s.startswith("#|")).strip()
        if c.cell_type == "markdown": parts.append(body)
        elif body and not re.search(r"^#\|\s*hide", c.source, re.M):
            parts.append(f"```python\n{body}\n```")
            for o in c.outputs:
                shown = o.get("data", {})
                if "text/markdown" in shown: parts.append(shown["text/markdown"].rstrip())
                elif t := o.get("text") or shown.get("text/plain"): parts.append(f"```text\n{t.rstrip()}\n```")
    text = re.sub(r"\]\((\d\d_[\w.]+\.ipynb)", r"](nbs/\1", "\n\n".join(parts))
    return re.sub(r"\]\((images/)", r"](nbs/\1", text) + "\n"


def write_readme() -> None:
    "Write README.md, only when it changed."
    path, text = ROOT / "README.md", readme()
    if not path.exists() or path.read_text("utf-8") != text: path.write_text(text, "utf-8")


MATH = re.compile(r'<span class="math (inline|display)">\s*\\[(\[](.*?)\\[)\]]\s*</span>', re.S)
KATEX = re.compile(r'<(?:link|script)[^>]*katex[^>]*>(?:\s*</script>)?|<script[^>]*>(?:(?!</script>).)*renderMathInElement(?:(?!</script>).)*</script>', re.S)


def to_mathml(page: str) -> str:
    "TeX to MathML at build time: browsers draw it themselves, and the page asks no other host for anything."
    from latex2mathml.converter import convert

    page = MATH.sub(lambda m: convert(html.unescape(m[2]), display="block" if m[1] == "display" else "inline"), page)
    return KATEX.sub("", page)


def run(*cmd: str) -> None:
    "Run a command in the root; stop the build when it fails."
    done = subprocess.run(cmd, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "tools")})  # settings.ini names docs_procs
    if done.returncode: sys.exit(done.returncode)


def for_smalldocs() -> None:
    "Leave out of nbdev's output what only Quarto reads: the mathematics option (`to_mathml` does that) and the pages' file names."
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))
    del site["format"]["html"]["html-math-method"]
    site["metadata-files"] = ["nbdev.yml", "sidebar.yml"]
    (PROC / "_quarto.yml").write_text(yaml.safe_dump(site, sort_keys=False, allow_unicode=True), "utf-8")
    for p in PROC.glob("*.ipynb"):
        p.write_text(re.sub(r'"output-file: [^"]*\\n",?\s*', "", p.read_text("utf-8")).replace(r"\noutput-file: ", r"\n# "), "utf-8")


def local_links(page: str) -> str:
    "Links of names to their documentation stay within the site that is being built."
    pages = {re.sub(r"^\d+_", "", p.stem): p.stem for p in (ROOT / "nbs").glob("*.ipynb")}
    site = re.escape("https://fundamentallm.github.io/fundamentallm/")
    page = page.replace("#LNone", "")  # nbdev's link to the source knows the file, not always the line
    return re.sub(site + r"([\w.]+)\.html", lambda m: f"{pages[m[1]]}.html" if m[1] in pages else m[0], page)


def with_smalldocs() -> None:
    "nbdev's processed notebooks, rendered by smalldocs, checked for broken links."
    from nbdev.doclinks import _build_modidx
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml(); _build_modidx(); nbdev_sidebar.__wrapped__()
    shutil.rmtree(PROC, ignore_errors=True)
    proc_nbs(ROOT / "nbs", n_workers=2, force=True)
    for_smalldocs()
    run("smalldocs", "render", "--quiet", str(PROC))
    run("smalldocs", "check", str(PROC))
    for p in SITE.rglob("*.html"): p.write_text(local_links(to_mathml(p.read_text("utf-8"))), "utf-8")
    shutil.rmtree(DOCS, ignore_errors=True); shutil.move(SITE, DOCS)


def check_site() -> None:
    "No page of the site loads a script, style or picture from another host, and every picture says what it shows."
    bad = []
    for p in sorted(DOCS.rglob("*.html")):
        text = p.read_text("utf-8")
        bad += [f"{p.name}: loads {u}" for u in re.findall(r'<(?:script|img)[^>]*\ssrc="(https?://[^"]+)"', text)]
        bad += [f"{p.name}: loads {u}" for u in re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(https?://[^"]+)"', text)]
        bad += [f"{p.name}: a picture without alt text: {t[:90]}" for t in re.findall(r"<img[^>]*>", text) if not re.search(r'alt="[^"]+"', t)]
        if re.match(r"\d\d_", p.name) and "float:right; font-size:smaller" not in text: bad.append(f"{p.name}: no API reference")
        bad += [f"{p.name}: mathematics left as TeX: {t[:60]}" for t in re.findall(r'<span class="math[^>]*>.{0,60}', text)]
    for b in bad: print("  ", b)
    if bad: sys.exit(1)
    print(f"{len(list(DOCS.rglob('*.html')))} pages in _docs")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--readme", action="store_true", help="only write README.md")
    a = ap.parse_args()
    write_readme()
    if a.readme: return
    if shutil.which("quarto"): run("nbdev_docs"); write_readme()
    else: with_smalldocs()
    check_site()


if __name__ == "__main__": main()
