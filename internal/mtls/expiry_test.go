package mtls_test

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/mtls/mtlstest"
)

// The end of a certificate is that of the file as it is now, and one that cannot be read has none.
func TestExpiry(t *testing.T) {
	authority, dir := mtlstest.NewAuthority(t), t.TempDir()
	expiry := mtls.Expiry{"agent": mtls.Dir(dir), "gone": mtls.Dir(t.TempDir())}
	for _, life := range []time.Duration{time.Hour, 48 * time.Hour} {
		before := time.Now().Add(life)
		authority.Issue(t, dir, mtls.AgentName, life)
		if n := testutil.CollectAndCount(expiry); n != 1 {
			t.Errorf("%d series, want that of the certificate that can be read", n)
		}
		end := testutil.ToFloat64(expiry)
		if off := time.Unix(int64(end), 0).Sub(before); off < -time.Minute || off > time.Minute {
			t.Errorf("the certificate ends %s off", off)
		}
	}
	if problems, err := testutil.CollectAndLint(expiry); err != nil || len(problems) > 0 {
		t.Errorf("%v (%v)", problems, err)
	}
}
