"""Style sheet of the report: light and dark, on screen and on paper, without outside files."""

STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1d2128;--soft:#5a6270;
--line:#e2e4e8;--c1:#c2410c;--c2:#1d63d8;--c3:#0b7f57;--c4:#8a3fb0;--c5:#9a6700;--c6:#0e7490;
--c7:#be185d;--warn:#8a5a00;--warnbg:#fff6e0}
@media (prefers-color-scheme:dark){:root{--page:#14161a;--card:#1b1e24;--ink:#e7e9ee;--soft:#a0a8b5;
--line:#323741;--c1:#ff9a5c;--c2:#74a9ff;--c3:#4fd0a0;--c4:#d19af0;--c5:#e5bf5a;--c6:#5bcbe0;
--c7:#ff8db8;--warn:#f2c568;--warnbg:#2b2415}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:40px 28px 64px}
header{border-bottom:1px solid var(--line);padding-bottom:22px}
.kind{color:var(--soft);font-size:13px;letter-spacing:.02em;margin:0}
h1{font-size:30px;line-height:1.2;margin:2px 0 6px;letter-spacing:-.015em;overflow-wrap:anywhere}
.lead{margin:0;color:var(--soft);max-width:80ch}
h2{font-size:19px;margin:44px 0 4px;letter-spacing:-.01em}
h3{font-size:15px;margin:0}
p.about{color:var(--soft);margin:0 0 14px;max-width:85ch;font-size:14px}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:10px 28px;
margin:22px 0 0;font-size:14px}
dl.facts dt{color:var(--soft);font-size:12.5px}
dl.facts dd{margin:0;overflow-wrap:anywhere}
.figures{display:flex;flex-wrap:wrap;gap:14px 44px;margin:16px 0 20px;padding:0;list-style:none}
.figures b{display:block;font-size:30px;line-height:1.15;font-weight:600;letter-spacing:-.02em}
.figures small{font-size:16px;font-weight:400;color:var(--soft);letter-spacing:0}
.figures span{color:var(--soft);font-size:13px}
.note{background:var(--warnbg);border-left:3px solid var(--warn);padding:9px 14px;margin:14px 0 0;
font-size:14px;border-radius:0 4px 4px 0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:18px}
.chart,.case{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:0;
padding:14px 16px 10px;break-inside:avoid}
.chart figcaption{font-weight:600;font-size:14px}
.chart{display:flex;flex-direction:column}
.chart p{color:var(--soft);font-size:13px;margin:2px 0 4px}
.chart svg{display:block;width:100%;height:auto;margin-top:auto}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:1px 16px;margin:3px 0 6px;padding:0;
font-size:12.5px;color:var(--soft)}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;vertical-align:middle;
margin-right:6px}
.legend b{color:var(--ink);font-weight:500}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
svg text{fill:var(--soft);font-size:11.5px}svg .label{fill:var(--ink);font-size:13px}
.series path{fill:none;stroke:var(--s);stroke-width:1.7;stroke-linejoin:round}
.series circle{fill:var(--s)}
.strip circle{fill:var(--s);fill-opacity:.55;stroke:var(--card);stroke-width:.7}
.strip .mean{stroke:var(--s);stroke-width:2.4}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;width:100%}
th,td{padding:6px 12px 6px 0;
text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--soft);font-size:12.5px;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:break-word;
min-width:9em;max-width:26em}
thead tr:last-child th{border-bottom:1px solid var(--soft)}
th.group{text-align:center;border-bottom:1px solid var(--line)}
tr.total td{border-top:1px solid var(--soft);font-weight:600}
td .sd{color:var(--soft);font-weight:400}
td.low{color:var(--warn);font-weight:600}
.key{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:8px}
.classes{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 12px;padding:0;
font-size:14px}
.case{margin-bottom:16px;padding-bottom:14px}
.case header{border:0;padding:0;display:flex;flex-wrap:wrap;gap:2px 18px;align-items:baseline;
margin-bottom:10px}
.case h3{overflow-wrap:anywhere}
.case header span{color:var(--soft);font-size:13.5px}
.views{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr));gap:14px 22px}
.view{margin:0}.view figcaption{font-size:12.5px;color:var(--soft);margin-top:4px}
.panels{display:grid;grid-template-columns:repeat(3,1fr);gap:6px}
.panel>span{display:block;font-size:12px;color:var(--soft);text-align:center}
.frame{position:relative;background:#000;border-radius:3px;overflow:hidden;
--c1:#ff9a5c;--c2:#74a9ff;--c3:#4fd0a0;--c4:#d19af0;--c5:#e5bf5a;--c6:#5bcbe0;--c7:#ff8db8}
.frame svg{position:absolute;inset:0;width:100%;height:100%}
.frame span{position:absolute;color:#fff;font-size:11px;text-shadow:0 0 3px #000,0 0 2px #000}
.frame b{font-weight:600}
.frame .left{left:4px;top:50%;transform:translateY(-50%)}
.frame .top{top:1px;left:50%;transform:translateX(-50%)}
.outline{fill:none;stroke:var(--s);stroke-width:1.6;vector-effect:non-scaling-stroke;
stroke-linejoin:round}
details{border-top:1px solid var(--line);padding:8px 0}
details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;font-weight:500}
summary small{color:var(--soft);font-weight:400;font-size:13px;margin-left:8px}
details .scroll{margin:8px 0 10px}
tr.changed td{font-weight:600}
td.text,th.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
ul.plain{margin:0;padding-left:18px;font-size:14px;color:var(--soft);max-width:90ch}
footer{margin-top:48px;color:var(--soft);font-size:13px}
@media print{:root{--page:#fff}body{font-size:12px}main{max-width:none;padding:0}
h2{break-after:avoid}}
"""
