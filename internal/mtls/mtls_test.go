package mtls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/eni-guard/eni-guard/internal/mtls/mtlstest"
)

// serve starts an agent's server and returns its URL; every request to it is answered.
func serve(t *testing.T, dir Dir) string {
	t.Helper()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	server.TLS = Server(dir, WebhookName)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	return server.URL
}

// call makes one request over a new connection.
func call(t *testing.T, source Source, url string) error {
	t.Helper()
	transport := &http.Transport{DialTLSContext: Dialer(source, &net.Dialer{Timeout: 5 * time.Second}, AgentName)}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	return response.Body.Close()
}

func TestBothSidesMustShowTheirName(t *testing.T) {
	ours, theirs := mtlstest.NewAuthority(t), mtlstest.NewAuthority(t)
	for _, test := range []struct {
		name           string
		server, client func(dir string)
		want           string // empty: the call succeeds
	}{
		{"agent and webhook", issue(t, ours, AgentName, time.Hour), issue(t, ours, WebhookName, time.Hour), ""},
		{"an agent calls an agent", issue(t, ours, AgentName, time.Hour), issue(t, ours, AgentName, time.Hour), "certificate"},
		{"a webhook poses as an agent", issue(t, ours, WebhookName, time.Hour), issue(t, ours, WebhookName, time.Hour), "not eni-guard-agent"},
		{"a client of another authority", issue(t, ours, AgentName, time.Hour), func(dir string) {
			theirs.Issue(t, dir, WebhookName, time.Hour)
			trust(t, ours, dir)
		}, "certificate"},
		{"a server of another authority", issue(t, theirs, AgentName, time.Hour), issue(t, ours, WebhookName, time.Hour), "unknown authority"},
		{"the client's certificate has expired", issue(t, ours, AgentName, time.Hour), issue(t, ours, WebhookName, -time.Minute), "certificate"},
		{"the server's certificate has expired", issue(t, ours, AgentName, -time.Minute), issue(t, ours, WebhookName, time.Hour), "expired"},
	} {
		t.Run(test.name, func(t *testing.T) {
			server, client := t.TempDir(), t.TempDir()
			test.server(server)
			test.client(client)
			url := serve(t, Dir(server))
			err := call(t, Dir(client), url)
			// A server refuses when its client is through with the handshake, and so the reason may come too late to be told.
			for range 50 {
				if err == nil || strings.Contains(err.Error(), test.want) {
					break
				}
				err = call(t, Dir(client), url)
			}
			switch {
			case test.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
}

func issue(t *testing.T, a *mtlstest.Authority, name string, life time.Duration) func(dir string) {
	return func(dir string) { a.Issue(t, dir, name, life) }
}

// trust replaces the authority that a directory trusts.
func trust(t *testing.T, a *mtlstest.Authority, dir string) {
	other := t.TempDir()
	a.Issue(t, other, "unused", time.Hour)
	if err := os.Rename(filepath.Join(other, authorityFile), filepath.Join(dir, authorityFile)); err != nil {
		t.Fatal(err)
	}
}

func TestACallerWithoutACertificateGetsNothing(t *testing.T) {
	dir := t.TempDir()
	mtlstest.NewAuthority(t).Issue(t, dir, AgentName, time.Hour)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, serve(t, Dir(dir)), nil)
	if err != nil {
		t.Fatal(err)
	}
	told := errors.New("not asked")
	for range 50 { // see TestBothSidesMustShowTheirName
		if strings.Contains(told.Error(), "certificate required") {
			return
		}
		var response *http.Response
		if response, told = client.Do(request); told == nil {
			response.Body.Close()
			t.Fatalf("answered %s", response.Status)
		}
	}
	t.Errorf("got %v", told)
}

func TestReplacedFilesAreInForceAtTheNextHandshake(t *testing.T) {
	server, client := t.TempDir(), t.TempDir()
	first, second := mtlstest.NewAuthority(t), mtlstest.NewAuthority(t)
	first.Issue(t, server, AgentName, time.Hour)
	first.Issue(t, client, WebhookName, time.Hour)
	url := serve(t, Dir(server))
	if err := call(t, Dir(client), url); err != nil {
		t.Fatal(err)
	}
	second.Issue(t, server, AgentName, time.Hour)
	if err := call(t, Dir(client), url); err == nil {
		t.Error("the server still uses its old certificate, or trusts the old authority")
	}
	second.Issue(t, client, WebhookName, time.Hour)
	if err := call(t, Dir(client), url); err != nil {
		t.Error(err)
	}
}

func TestCheckNamesWhatIsWrong(t *testing.T) {
	for _, test := range []struct {
		file, content, want string
	}{
		{certificateFile, "", "tls.crt and tls.key: "},
		{keyFile, "no key", "tls.crt and tls.key: "},
		{authorityFile, "no certificate", "ca.crt holds no PEM certificate"},
	} {
		dir := t.TempDir()
		mtlstest.NewAuthority(t).Issue(t, dir, AgentName, time.Hour)
		if err := Dir(dir).Check(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, test.file), []byte(test.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := Dir(dir).Check(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want an error with %q", test.file, err, test.want)
		}
	}
	if err := Dir(t.TempDir()).Check(); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("an empty directory: %v", err)
	}
}

// The kubelet writes the new files beside the old ones, and then lets one link point to them.
func TestAReplacedVolumeIsReadWhole(t *testing.T) {
	dir := t.TempDir()
	generation := func(i int) string { return filepath.Join(dir, fmt.Sprint("..", i%2)) }
	for i := range 2 {
		if err := os.Mkdir(generation(i), 0o700); err != nil {
			t.Fatal(err)
		}
		mtlstest.NewAuthority(t).Issue(t, generation(i), AgentName, time.Hour)
	}
	point := func(i int) error {
		link := filepath.Join(dir, "..data_tmp")
		return errors.Join(os.Symlink(generation(i), link), os.Rename(link, filepath.Join(dir, "..data")))
	}
	if err := point(0); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{certificateFile, keyFile, authorityFile} {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 1000 {
		replaced := make(chan error)
		go func() { replaced <- point(i + 1) }()
		if err := Dir(dir).Check(); err != nil {
			t.Error(err)
		}
		if err := <-replaced; err != nil {
			t.Fatal(err)
		}
	}
}

func TestMemoryKeepsWhatIsGood(t *testing.T) {
	ours := mtlstest.NewAuthority(t)
	server, client := t.TempDir(), t.TempDir()
	ours.Issue(t, server, AgentName, time.Hour)
	ours.Issue(t, client, WebhookName, time.Hour)
	url := serve(t, Dir(server))
	data := map[string][]byte{}
	for _, name := range []string{certificateFile, keyFile, authorityFile} {
		content, err := os.ReadFile(filepath.Join(client, name))
		if err != nil {
			t.Fatal(err)
		}
		data[name] = content
	}
	memory := &Memory{}
	if err := call(t, memory, url); err == nil || memory.Check() == nil {
		t.Errorf("an empty memory has a certificate: %v", err)
	}
	if err := memory.Set(data); err != nil {
		t.Fatal(err)
	}
	if err := memory.Set(map[string][]byte{}); err == nil {
		t.Error("nothing was taken for a certificate")
	}
	if err := call(t, memory, url); err != nil {
		t.Error(err)
	}
}
