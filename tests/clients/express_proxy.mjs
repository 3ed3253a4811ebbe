// Express with its compression in front of a server: `node express_proxy.mjs TARGET` prints the port it listens on.
import compression from "compression";
import express from "express";
import { createProxyMiddleware } from "http-proxy-middleware";

const app = express();
app.use(compression({ threshold: 0 }));
app.use(createProxyMiddleware({ target: process.argv[2], changeOrigin: true }));
const server = app.listen(0, "127.0.0.1", () => console.log(server.address().port));
