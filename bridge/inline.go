package bridge

import (
	"context"
	"time"

	"ebb/sql"
)

// endWaitsEvery is how often it is looked for waits that are to be ended, while a slot is being made.
const endWaitsEvery = 250 * time.Millisecond

// waits ends the waits of COMMITs for a delivery that cannot come before they have ended.
type waits struct {
	cfg  *Config
	said map[int32]bool
}

func newWaits(cfg *Config) *waits { return &waits{cfg: cfg, said: map[int32]bool{}} }

// end ends those that there are. Of one that it may not end it says, once, who may.
func (w *waits) end(ctx context.Context, db *pgxConn) error {
	ended, err := sql.EndWaits(ctx, db, w.cfg.Slot)
	if err != nil {
		return err
	}
	for _, e := range ended {
		if w.said[e.PID] {
			continue
		}
		w.said[e.PID] = true
		if e.Ended {
			w.cfg.Logger.Warn("ended a session whose COMMIT waited for delivery, which could not come before the slot is made anew; "+
				"it has committed, and will be delivered", "slot", w.cfg.Slot, "pid", e.PID, "role", e.Role)
			continue
		}
		w.cfg.Logger.Error("a COMMIT waits for delivery, which cannot come before it has ended: have a superuser do "+
			"SELECT pg_terminate_backend(pid); it has committed, and will be delivered", "slot", w.cfg.Slot, "pid", e.PID, "role", e.Role)
	}
	return nil
}
