//! A web server with a folder of its own.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{Background, Namespace, file, text, wait_for_server};

/// What [`Web::start`] needs.
pub const PROGRAMS: [&str; 3] = ["nginx", "openssl", "curl"];

/// nginx at [`SERVER`](super::SERVER) and [`SERVER6`](super::SERVER6): HTTP/1 at port 80, HTTP/2 over TLS at 443
/// for any name. It serves and takes files, in a folder of its own.
pub struct Web {
    folder: TempDir,
    server: Option<Background>,
}

impl Web {
    pub fn start(namespace: &Namespace) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        certificate(folder.path());
        let configuration = format!(
            "daemon off; master_process off; error_log {path}/errors; pid {path}/pid; user root;\n\
             events {{ worker_connections 4096; }}\n\
             http {{ access_log off; client_max_body_size 0; client_body_temp_path {path}/body; sendfile on;\n\
             proxy_temp_path {path}/p; fastcgi_temp_path {path}/f; uwsgi_temp_path {path}/u; scgi_temp_path {path}/s;\n\
             server {{ listen 192.0.2.7:80; listen [2001:db8::7]:80; listen 192.0.2.7:443 ssl http2; ssl_certificate {path}/certificate.pem;\n\
             ssl_certificate_key {path}/key.pem; root {path}; dav_methods PUT; }} }}"
        );
        file(folder.path(), "nginx.conf", &configuration);
        let mut web = Self { folder, server: None };
        web.restart(namespace);
        web
    }

    /// Starts the server again after [`Web::kill`].
    pub fn restart(&mut self, namespace: &Namespace) {
        let mut server = namespace.command("nginx");
        server
            .args(["-p", self.path().to_str().unwrap(), "-c", "nginx.conf"])
            .stderr(Stdio::null());
        self.server = Some(Background(server.spawn().unwrap()));
        wait_for_server(namespace, "192.0.2.7:80");
    }

    /// Ends the server as a crash would.
    pub fn kill(&mut self) {
        self.server = None;
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Puts a file of `len` bytes there, which repeat nowhere near, and returns its hash.
    pub fn publish(&self, name: &str, len: usize) -> [u8; 32] {
        publish(self.path(), name, len)
    }
}

/// Makes `certificate.pem` and `key.pem` in `folder`.
pub fn certificate(folder: &Path) {
    let line = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=example.test -days 2 \
                -keyout key.pem -out certificate.pem";
    let made = Command::new("openssl")
        .args(line.split_whitespace())
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
}

/// Makes a file of `len` bytes in `folder`, which repeat nowhere near, and returns its hash.
pub fn publish(folder: &Path, name: &str, len: usize) -> [u8; 32] {
    let content: Vec<u8> = (0..len as u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    std::fs::write(folder.join(name), &content).unwrap();
    Sha256::digest(&content).into()
}

/// The hash of a file.
pub fn hash(path: &Path) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut file = std::fs::File::open(path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => break,
            len => hash.update(&buffer[..len]),
        }
    }
    hash.finalize().into()
}
